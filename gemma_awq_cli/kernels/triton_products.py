"""Triton kernels for packed weights: a product for few rows, and unpacking in one pass. Imports triton.

The product reads the file's own tensors. Of each group it sums up `x q` first and then takes the zero point and the
scale, so that a weight is never rounded, and costs a shift, a mask and a conversion. Few rows of a small matrix would
not fill a GPU, so the inputs are split; the parts are summed up by a second kernel in a fixed order, without atomics.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemma_awq_cli.awq.packed_arrays import PACK
from gemma_awq_cli.awq.packing import PackedWeight

IN_INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"  # as triton itself knows it
FEW_ROWS = 8  # that the product takes; a tile of tensor cores has room for 16
_TILE_ROWS = 16
_TILE_WORDS = 8  # of eight outputs each
_PROGRAMS = 256  # that fill a large GPU
_SUMMED = 1024  # elements that a program of the second kernel sums up
_UNPACKED_ROWS = 16


@triton.jit
def _spread(words):
    """Words [A, B] -> [A, 8 B]: each eight times, for its eight nibbles."""
    words = tl.interleave(words, words)
    words = tl.interleave(words, words)
    return tl.interleave(words, words)


@triton.jit
def _shifts(OUTPUTS: tl.constexpr):  # noqa: N803
    """How far right each output's nibble lies in its word: nibble i holds column (0, 2, 4, 6, 1, 3, 5, 7)[i]."""
    column = tl.arange(0, OUTPUTS) % 8
    return ((column % 2) * 4 + column // 2) * 4


@triton.jit
def _product(
    x, qweight, qzeros, scales, out, rows, inputs, words, groups,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,  # noqa: N803
    WIDE: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """out [splits, rows, outputs] float32: of one split, `GROUPS` groups of `GROUP` inputs, and of one tile of outputs.

    x: [rows, inputs]; words: outputs / 8; WIDE: multiply in float32, for the interpreter, which misreads bfloat16.
    Groups beyond the last count nothing: their inputs are read as 0.
    """
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    output = tl.program_id(0) * WORDS * 8 + tl.arange(0, WORDS * 8)
    split = tl.program_id(1)
    row = tl.arange(0, ROWS)
    depth = tl.arange(0, GROUP)
    shifts = _shifts(WORDS * 8)
    total = tl.zeros((ROWS, WORDS * 8), tl.float32)
    for step in range(GROUPS):
        at = (split * GROUPS + step) * GROUP + depth
        group = tl.minimum(split * GROUPS + step, groups - 1)
        seen = (row[:, None] < rows) & (at[None, :] < inputs)
        a = tl.load(x + row[:, None] * inputs + at[None, :], mask=seen, other=0.0)
        held = (at[:, None] < inputs) & (word[None, :] < words)
        packed = tl.load(qweight + at[:, None] * words + word[None, :], mask=held, other=0)
        q = ((_spread(packed) >> shifts[None, :]) & 15).to(tl.float32)
        zeros = tl.load(qzeros + group * words + word[None, :], mask=word[None, :] < words, other=0)
        zero = ((_spread(zeros) >> shifts[None, :]) & 15).to(tl.float32)
        scale = tl.load(scales + group * words * 8 + output[None, :], mask=output[None, :] < words * 8, other=0.0)
        sums = tl.sum(a.to(tl.float32), 1)
        if WIDE:  # noqa: SIM108 (decided when it is compiled)
            product = tl.dot(a.to(tl.float32), q, input_precision="ieee")
        else:
            product = tl.dot(a, q.to(a.dtype))  # integers up to 15 are exact
        total += (product - sums[:, None] * zero) * scale.to(tl.float32)
    place = out + (split * rows + row[:, None]) * words * 8 + output[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=(row[:, None] < rows) & (output[None, :] < words * 8))


@triton.jit
def _summed(parts, out, count, splits, BLOCK: tl.constexpr):  # noqa: N803
    """out [count]: the sum of parts [splits, count] float32, the first part first."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        total += tl.load(parts + split * count + at, mask=at < count, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < count)


def few_rows_product(x: Tensor, packed: PackedWeight) -> Tensor:
    """x [R, K] of at most `FEW_ROWS` rows in 16 bits times the weight [K, N] of the file's tensors: [R, N]."""
    rows, inputs = x.shape
    words, groups = packed.qweight.shape[1], packed.scales.shape[0]
    outputs, group = words * PACK, inputs // groups
    tiles = triton.cdiv(words, _TILE_WORDS)
    splits, per_split = splits_of(tiles, groups)
    result = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    parts = result if splits == 1 else torch.empty(splits, rows, outputs, dtype=torch.float32, device=x.device)
    _product[(tiles, splits)](
        x, packed.qweight, packed.qzeros, packed.scales, parts, rows, inputs, words, groups,
        GROUP=group, GROUPS=per_split, ROWS=_TILE_ROWS, WORDS=_TILE_WORDS, WIDE=IN_INTERPRETER,
    )  # fmt: skip
    if splits > 1:
        count = rows * outputs
        _summed[(triton.cdiv(count, _SUMMED),)](parts, result, count, splits, BLOCK=_SUMMED)
    return result


def splits_of(tiles: int, groups: int) -> tuple[int, int]:
    """Into how many parts the groups of a product with so many tiles of outputs are split, and the groups of each."""
    wanted = min(groups, max(1, _PROGRAMS // tiles))
    per_split = -(-groups // wanted)
    return -(-groups // per_split), per_split


@triton.jit
def _unpacked(
    qweight, qzeros, scales, out, inputs, words,
    GROUP: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """out [inputs, outputs]: `ROWS` inputs, which are of one group, and one tile of outputs."""
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    output = tl.program_id(1) * WORDS * 8 + tl.arange(0, WORDS * 8)
    group = tl.program_id(0) * ROWS // GROUP
    shifts = _shifts(WORDS * 8)
    packed = tl.load(
        qweight + at[:, None] * words + word[None, :], mask=(at[:, None] < inputs) & (word[None, :] < words), other=0
    )
    zeros = tl.load(qzeros + group * words + word[None, :], mask=word[None, :] < words, other=0)
    scale = tl.load(scales + group * words * 8 + output[None, :], mask=output[None, :] < words * 8, other=0.0)
    q = (_spread(packed) >> shifts[None, :]) & 15
    zero = (_spread(zeros) >> shifts[None, :]) & 15
    weight = (q - zero).to(tl.float32) * scale.to(tl.float32)
    place = out + at[:, None] * words * 8 + output[None, :]
    keep = (at[:, None] < inputs) & (output[None, :] < words * 8)
    tl.store(place, weight.to(out.dtype.element_ty), mask=keep)


def unpacked(packed: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The weight [K, N] of the file's tensors, each number rounded once."""
    inputs, words = packed.qweight.shape
    group = inputs // packed.scales.shape[0]
    result = torch.empty(inputs, words * PACK, dtype=dtype, device=packed.qweight.device)
    _unpacked[(triton.cdiv(inputs, _UNPACKED_ROWS), triton.cdiv(words, 4 * _TILE_WORDS))](
        packed.qweight, packed.qzeros, packed.scales, result, inputs, words,
        GROUP=group, ROWS=_UNPACKED_ROWS, WORDS=4 * _TILE_WORDS,
    )  # fmt: skip
    return result


@triton.jit
def _tiles(
    packed, order, scale_zero, out, inputs, outputs,
    GROUP: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """One tile [HEIGHT, WIDTH] of out [outputs, inputs], whose nibbles lie in `order` in the tile's bytes.

    packed: the bytes of all tiles; scale_zero: [inputs / GROUP, outputs, 2], w = (q - 8) * scale + zero.
    """
    across = inputs // WIDTH
    tile = tl.program_id(0) * across + tl.program_id(1)
    row = tl.arange(0, HEIGHT)
    column = tl.arange(0, WIDTH)
    nibble = tl.load(order + row[:, None] * WIDTH + column[None, :])
    byte = tl.load(packed + tile * (HEIGHT * WIDTH // 2) + nibble // 2).to(tl.int32)
    q = (byte >> ((nibble % 2) * 4).to(tl.int32)) & 15
    output = tl.program_id(0) * HEIGHT + row
    at = tl.program_id(1) * WIDTH + column
    pair = ((at[None, :] // GROUP) * outputs + output[:, None]) * 2
    scale = tl.load(scale_zero + pair).to(tl.float32)
    zero = tl.load(scale_zero + pair + 1).to(tl.float32)
    weight = zero + (q - 8).to(tl.float32) * scale  # the product is exact: rounded once, fused or not
    tl.store(out + output[:, None] * inputs + at[None, :], weight.to(out.dtype.element_ty))


def unpacked_tiles(
    packed: Tensor, order: Tensor, scale_zero: Tensor, shape: tuple[int, int], tile: tuple[int, int]
) -> Tensor:
    """The weight `shape` [N, K] bf16 of PyTorch's int4 layout. See `cuda.tile_order` for `order`, and `cuda`."""
    outputs, inputs = shape
    result = torch.empty(outputs, inputs, dtype=scale_zero.dtype, device=packed.device)
    _tiles[(outputs // tile[0], inputs // tile[1])](
        packed.view(torch.uint8), order, scale_zero, result, inputs, outputs,
        GROUP=inputs // scale_zero.shape[0], HEIGHT=tile[0], WIDTH=tile[1],
    )  # fmt: skip
    return result
