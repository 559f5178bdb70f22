"""The weights of one planned tensor: read in runs of rows, encoded as ggml's blocks, and compared with a file's."""

from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from gemma_awq_cli.awq.packed_arrays import PACK
from gemma_awq_cli.awq.packing import unpack_columns
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.export.ggml_blocks import BLOCK, SUPER_BLOCK, pack_q4_0, pack_q4_1, pack_q5_0, pack_q6_k
from gemma_awq_cli.export.gguf_tensors import GgufTensor, Given, Packed, Stored
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint

_RUN = 1 << 20  # weights that are converted at once
_HALF_STEP = 2.0**-25  # of the smallest float16 numbers

# The largest difference of a weight in a lossy table, in units of the largest weight of its block: half a step, and
# the rounding of the step to float16. A step of Q6_K is a 32nd, it is rounded to 8 bits,
# and one end of its levels is a step shorter.
_TABLE_LIMITS = {"Q8_0": (BLOCK, 0.5 / 127 + 2**-11), "Q6_K": (SUPER_BLOCK, 1 / 24)}


class PackedRows(NamedTuple):
    """integers: [N, B, 32], 0..15; zero: [N, B] uint8; scale: [N, B] float16. A weight is (integer - zero) * scale."""

    integers: npt.NDArray[np.uint8]
    zero: npt.NDArray[np.uint8]
    scale: npt.NDArray[np.float16]

    @property
    def levels(self) -> npt.NDArray[np.int8]:
        return self.integers.astype(np.int8) - self.zero[..., None].astype(np.int8)


Rows = PackedRows | npt.NDArray[np.float32]


def rows_of(checkpoint: Checkpoint, tensor: GgufTensor) -> Iterator[Rows]:
    """Yield all rows of a tensor in order, some at a time: 4-bit ones as they are, others as float32 [N, K]."""
    match tensor.source:
        case Packed(linears):
            for name, linear in linears.items():
                yield from _packed_rows(checkpoint, name, linear)
        case Stored(keys, add):
            missing = prod(tensor.shape[:-1])
            for key in keys:
                for piece in checkpoint.pieces(key):
                    table = piece.reshape(-1, tensor.shape[-1])
                    missing -= len(table)
                    step = max(1, _RUN // tensor.shape[-1])
                    for first in range(0, len(table), step):
                        yield table[first : first + step].to(torch.float32).numpy() + np.float32(add)
            if missing:  # a per-layer table ends before the embedding, and transformers looks up row 0 there
                yield np.repeat(checkpoint.mapped(keys[0])[:1].astype(np.float32), missing, 0)
        case Given(values):
            flat = np.resize(np.array(values, np.float32), tensor.shape)
            yield flat.reshape(-1, tensor.shape[-1])


def _packed_rows(checkpoint: Checkpoint, name: str, linear: Any) -> Iterator[PackedRows]:
    packed = checkpoint.read_packed({name: linear})[name]
    step = max(PACK, _RUN // linear.inputs // PACK * PACK)
    for first in range(0, linear.outputs, step):
        words, columns = slice(first // PACK, (first + step) // PACK), slice(first, first + step)
        integers = unpack_columns(packed.qweight[:, words]).t().contiguous().numpy()
        zero = unpack_columns(packed.qzeros[:, words]).t().contiguous().numpy()
        scale = packed.scales[:, columns].to(torch.float16).t().contiguous().numpy()
        repeats = linear.inputs // scale.shape[1] // BLOCK
        yield PackedRows(
            integers.reshape(len(integers), -1, BLOCK), zero.repeat(repeats, axis=1), scale.repeat(repeats, axis=1)
        )


def encode(rows: Rows, kind: str) -> npt.NDArray[np.uint8]:
    """Return the bytes of rows in a ggml type, [N, bytes per row]."""
    if isinstance(rows, PackedRows):
        if kind == "Q4_1":
            return pack_q4_1(rows.integers, rows.zero, rows.scale)
        return pack_q4_0(rows.levels, rows.scale) if kind == "Q4_0" else pack_q5_0(rows.levels, rows.scale)
    if kind == "Q6_K":
        step = max(1, (1 << 15) // rows.shape[1])  # what fits a processor's cache
        return np.concatenate([pack_q6_k(rows[i : i + step]) for i in range(0, len(rows), step)])
    import gguf

    encoded = np.ascontiguousarray(gguf.quantize(rows, gguf.GGMLQuantizationType[kind]))
    return encoded.view(np.uint8).reshape(len(rows), -1)


def compare(rows: Rows, stored: npt.NDArray[np.uint8], tensor: GgufTensor) -> float:
    """Compare rows with the bytes that a file holds for them, as llama.cpp's own library decodes these.

    Returns the largest difference in units of a scale: 0 except for Q4_1. Raises GemmaAwqError beyond the tolerance.
    """
    import gguf

    decoded = np.asarray(gguf.dequantize(_typed(stored, tensor.kind), gguf.GGMLQuantizationType[tensor.kind]))
    worst = 0.0
    if isinstance(rows, PackedRows):
        scale = rows.scale.astype(np.float32)[..., None]
        error = np.abs(decoded.reshape(rows.integers.shape) - rows.levels * scale)
        limit = np.float32(0)
        if tensor.kind == "Q4_1":  # the minimum is rounded to float16, and float32 rounds the sum
            least = rows.zero[..., None] * scale
            limit = np.maximum(least * np.float32(2**-11 + 2**-22), np.float32(_HALF_STEP))
            worst = float((error / np.where(scale == 0, 1, scale)).max(initial=0.0))
        sound = bool((error <= limit).all())
    elif tensor.kind in _TABLE_LIMITS:
        block, share = _TABLE_LIMITS[tensor.kind]
        blocks = (len(rows), -1, block)
        largest = np.abs(rows).reshape(blocks).max(-1)
        error = np.abs(decoded - rows).reshape(blocks).max(-1)
        sound = bool((error <= largest * np.float32(share) + np.float32(127 * _HALF_STEP)).all())
    else:
        sound = bool(np.array_equal(decoded.reshape(rows.shape), rows))
    if not sound:
        raise GemmaAwqError(
            f"{tensor.name} does not come back from the file as it was written.",
            "Check the disk, then export again with --force.",
        )
    return worst


def _typed(stored: npt.NDArray[np.uint8], kind: str) -> npt.NDArray[Any]:
    return stored.view({"F32": np.float32, "F16": np.float16}.get(kind, np.uint8))
