"""The compiled decoder: the language model as structures that C++ reads, and a session over them.

Integer linears meet 8-bit activations here, one scale a token and group; the torch decoder in bfloat16 is the fallback,
and for long prompts of 16-bit checkpoints the better way.
"""

from collections.abc import Sequence
from ctypes import c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemma_awq_cli.kernels.head import head_group
from gemma_awq_cli.kernels.native import linear as native
from gemma_awq_cli.kernels.native import structures
from gemma_awq_cli.kernels.native.library import Library
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.expected_tensors import linear_shapes
from gemma_awq_cli.models.forward.decoder_weights import JOINED, LayerReader, read_embedding, read_final_gain
from gemma_awq_cli.models.forward.kv_cache import KVCache, make_cache
from gemma_awq_cli.models.forward.torch_decoder import DecoderSession, Piece, TextWeights, chunks, tokens_of, wanted_of
from gemma_awq_cli.models.forward.torch_weights import read_torch_text
from gemma_awq_cli.models.gemma.architecture import Architecture

_KINDS = {"int8": native.INT8, "int4": native.INT4}
MANY_TOKENS = 16  # at once: from here on torch's bf16 product is faster than reading 16-bit weights row by row
_MAX_HEAD_DIM = 512  # of engine.cpp's buffers


@dataclass(frozen=True)
class NativeText:
    """The model as C++ reads it, and what keeps the memory behind its pointers alive.

    linears: of all layers, joined; dense: the same 16-bit weights for the torch decoder, None for an artifact.
    """

    library: Library
    arch: Architecture
    spec: structures.ModelSpec
    linears: tuple[native.NativeLinear, ...]
    head: native.NativeLinear
    dense: TextWeights | None
    keep: tuple[Any, ...]

    @property
    def token_bytes(self) -> int:
        """Bytes of weights that one token reads."""
        return sum(linear.nbytes for linear in self.linears) + self.head.nbytes


def native_refusal(checkpoint: Checkpoint, arch: Architecture, group_size: int | None) -> str | None:
    """Why the compiled decoder cannot take this model, or None."""
    if arch.head_dim % 16 or arch.head_dim > _MAX_HEAD_DIM or arch.intermediate % 16:
        return f"heads of {arch.head_dim} or an MLP of {arch.intermediate} do not fit its vectors"
    if group_size is not None:
        refusals = [native.refusal(size, group_size) for size in (arch.hidden, arch.query_size, arch.intermediate)]
        return next(filter(None, refusals), None)
    wide = {checkpoint.tensors[name].dtype for name in checkpoint.text_tensors()} - {torch.bfloat16}
    return f"it reads 16-bit weights in bfloat16 only, and this checkpoint has {min(map(str, wide))}" if wide else None


def read_native_text(
    library: Library, checkpoint: Checkpoint, arch: Architecture, group_size: int | None, head: str
) -> NativeText:
    """All weights of the language model, repacked for the compiled kernels; 16-bit ones stay where they are mapped."""
    embedding, weight = (tensor.to(torch.bfloat16).contiguous() for tensor in read_embedding(checkpoint))
    group = head_group(head, arch.hidden) if head in _KINDS else None
    arena = native.Arena(library, _arena_bytes(arch, group_size, head, group))
    keep: list[Any] = []
    linears: list[native.NativeLinear] = []
    ropes = {id(rope): (rope, rope.inv_freq.to(torch.float32).contiguous()) for rope in arch.ropes}
    layers = (structures.LayerSpec * arch.layers)()
    for index in range(arch.layers):
        reader = LayerReader(checkpoint, arch, index, group_size)
        layer = layers[index]
        for kind in ("qkv", "o", "gate_up", "down"):
            if group_size is not None:
                linear = native.from_awq(library, reader.packed(kind), arena)
            else:
                linear = native.dense(reader.dense(kind))
            linears.append(linear)
            setattr(layer, kind, linear.spec)
        for name, gain in reader.gains().items():
            if gain is not None:
                keep.append(gain)
                setattr(layer, name, gain.data_ptr())
        rope, inv_freq = ropes[id(arch.ropes[index])]
        layer.inv_freq, layer.rope_factor, layer.window = inv_freq.data_ptr(), rope.factor, arch.windows[index] or 0
    norm = read_final_gain(checkpoint, arch)
    copy = native.dense([weight]) if group is None else native.quantized(library, weight, _KINDS[head], group, arena)
    spec = structures.ModelSpec(
        hidden=arch.hidden, intermediate=arch.intermediate, heads=arch.heads, kv_heads=arch.kv_heads,
        head_dim=arch.head_dim, layers=arch.layers, eps=arch.eps,
        embed_scale=float(torch.tensor(arch.embed_scale, dtype=torch.bfloat16)), query_scale=arch.query_scale,
        attention_softcap=arch.attention_softcap or 0.0, final_softcap=arch.final_softcap or 0.0,
        embedding=embedding.data_ptr(), norm=norm.data_ptr(), head=copy.spec, layer=layers,
        exact=weight.data_ptr() if copy.spec.kind == native.INT4 else None,
    )  # fmt: skip
    dense = None
    if group_size is None:
        dense = read_torch_text(checkpoint, arch, None, torch.device("cpu"), torch.bfloat16)
    return NativeText(library, arch, spec, tuple(linears), copy, dense, (*keep, layers, ropes, embedding, weight, norm))


def native_report(text: NativeText) -> list[str]:
    """A line on the forward, the linears and the head."""
    kinds = {native.INT4: "int4", native.INT8: "int8", native.BF16: "bfloat16"}
    names = {kind: f"{name}, activations in int8 a group" for kind, name in kinds.items()}
    names[native.BF16] = "bfloat16, activations in float32"
    long = "" if text.dense is None else f"; {MANY_TOKENS} tokens and more at once: torch"
    layers, head = text.linears[0].spec, text.head.spec
    grouped = f" in groups of {head.group}" if head.group else ""
    grouped += "; the largest logits again in bfloat16" if text.spec.exact else ""
    return [
        f"forward: compiled C++ ({text.library.instructions}, {torch.get_num_threads()} threads){long}",
        f"qkv, o, gate_up, down: compiled {names[layers.kind]}, {sum(x.nbytes for x in text.linears) / 1e6:.1f} MB",
        f"head: compiled {names[head.kind]}{grouped}, {text.head.nbytes / 1e6:.1f} MB",
    ]


def _arena_bytes(arch: Architecture, group_size: int | None, head: str, group: int | None) -> int:
    """What all integer weights take together."""
    total = 0
    if group_size is not None:
        shapes = linear_shapes(arch)
        for names in JOINED.values():
            outputs = sum(shapes[name][0] for name in names)
            total += arch.layers * native.arena_bytes(native.INT4, shapes[names[0]][1], outputs, group_size)
    if group is not None:
        total += native.arena_bytes(_KINDS[head], arch.hidden, arch.vocabulary, group)
    return total


class NativeSession:
    """A `Session` over `NativeText`: one call into C++ a token, or a chunk of a prompt."""

    independent_rows = True

    def __init__(self, text: NativeText, rows: int, capacity: int) -> None:
        self._text = text
        self._use(make_cache(text.arch, rows, capacity, torch.device("cpu"), torch.bfloat16))

    def _use(self, cache: KVCache) -> None:
        self._cache = cache
        # 16-bit weights meet many tokens faster in torch's bf16 products; both decoders keep the same cache
        self._torch = None if self._text.dense is None else DecoderSession(self._text.dense, 0, 0, cache)
        layers = self._text.arch.layers
        self._spec = structures.CacheSpec(
            keys=(c_void_p * layers)(*(layer.data_ptr() for layer in self._cache.keys)),
            values=(c_void_p * layers)(*(layer.data_ptr() for layer in self._cache.values)),
            slots=structures.int64s(layer.shape[2] for layer in self._cache.keys),
        )

    def next_logits(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """See `Session.next_logits`."""
        return self.last_logits(tokens, [1] * len(tokens))

    def repeat_row(self, rows: int) -> None:
        """See `Session.expand`."""
        self._use(self._cache.repeated(rows))

    def last_logits(self, tokens: Sequence[Sequence[int]], counts: Sequence[int]) -> Tensor:
        """See `Session.last_logits`."""
        lengths = self._cache.lengths
        self._cache.require_room(tokens, self._text.arch.vocabulary)
        if self._torch is not None and sum(map(len, tokens)) >= MANY_TOKENS:
            return self._torch.last_logits(tokens, counts)
        ends = [length + len(new) for length, new in zip(lengths, tokens, strict=True)]
        parts = []
        for pieces in chunks(tokens, lengths):
            ids = [token for piece in pieces for token in tokens_of(tokens[piece.row], piece, lengths[piece.row])]
            wanted = [wanted_of(piece, ends[piece.row], counts[piece.row]) for piece in pieces]
            parts.append(self._forward(pieces, ids, wanted))
        lengths[:] = ends
        return parts[0] if len(parts) == 1 else torch.cat(parts)  # rows end in their order

    def reset_row(self, row: int) -> None:
        """See `Session.clear`."""
        self._cache.lengths[row] = 0

    def _forward(self, pieces: Sequence[Piece], ids: Sequence[int], wanted: Sequence[int]) -> Tensor:
        """Logits after the last `wanted` tokens of each piece, in their order."""
        count = len(pieces)
        specs = (structures.PieceSpec * count)()
        offset = 0
        for spec, piece in zip(specs, pieces, strict=True):
            spec.row, spec.start, spec.count, spec.offset = piece.row, piece.start, piece.count, offset
            offset += piece.count
        logits = torch.empty(sum(wanted), self._text.arch.vocabulary)
        flat = torch.tensor(ids, dtype=torch.int32)
        self._text.library.forward(
            self._text.spec, self._spec, specs, count, flat.data_ptr(), len(ids), structures.int64s(wanted),
            logits.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return logits
