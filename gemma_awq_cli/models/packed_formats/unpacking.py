"""Other layouts' tensors brought to AutoAWQ's GEMM layout, with numpy: arrays in, arrays out."""

from functools import cache

import numpy as np

from gemma_awq_cli.awq.packed_arrays import PackedArrays, exact_scales, pack_columns
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.packed_formats.packed_format import PACK
from gemma_awq_cli.system.arrays import Array

SYMMETRIC_ZERO = 8  # the zero point of layouts that store none
_EIGHTS = 0x88888888 - 2**32  # a word of them
_ONES = 0x11111111
_SHIFTS = tuple(range(0, 32, 4))
_MARLIN_TILE = 16


def unpack_along(packed: Array, axis: int) -> Array:
    """Unpack words that hold eight 4-bit integers in order, along `axis` (0 or 1): uint8."""
    nibbles = np.stack([((packed >> shift) & 15).astype(np.uint8) for shift in _SHIFTS], axis + 1)
    return nibbles.reshape(*packed.shape[:axis], -1, *packed.shape[axis + 1 :])


def to_gemm(q: Array, zero: Array | None, scale: Array) -> PackedArrays:
    """AutoAWQ's GEMM tensors of integers q [K, N], zero points [G, N] (None: symmetric) and scales [G, N]."""
    if zero is None:
        zero = np.full(scale.shape, SYMMETRIC_ZERO, np.uint8)
    return PackedArrays(pack_columns(q), pack_columns(zero), exact_scales(scale))


def without_zeros(qweight: Array, scales: Array) -> PackedArrays:
    """GEMM tensors that lack the zero points of a symmetric file."""
    eights = np.full((scales.shape[0], scales.shape[1] // PACK), _EIGHTS, np.int32)
    return PackedArrays(qweight, eights, exact_scales(scales))


def from_gemv(qweight: Array, qzeros: Array, scales: Array, groups: int) -> PackedArrays:
    """GEMV's tensors: see `autoawq.Gemv`. groups: how many of the padded ones count."""
    q, zero = unpack_along(qweight, 1), unpack_along(qzeros, 1)
    return to_gemm(q.T, zero[:, :groups].T, scales[:, :groups].T)


def from_gemv_fast(name: str, qweight: Array, qzeros: Array, scales: Array, groups: int) -> PackedArrays:
    """GEMV_FAST's tensors: see `autoawq.GemvFast`. The zero points are the integers in the stored products."""
    wide, offsets = (array[:groups].astype(np.float32) for array in (scales, qzeros))
    with np.errstate(all="ignore"):  # hostile numbers fail the check below
        zero = np.where(wide == 0, 0.0, -offsets / np.where(wide == 0, 1.0, wide))
        whole = np.round(zero)
        # the product was rounded to float16: 15 is off by at most 0.01
        sound = bool(((np.abs(zero - whole) < 0.1) & (whole >= 0) & (whole <= 15)).all())
    if not sound:
        raise GemmaAwqError(
            f"{name}.qzeros do not hold zero points of 0 to 15 times the scales.", "The file is damaged: get it again."
        )
    return to_gemm(_interleaved(qweight).T, whole, scales[:groups])


def _interleaved(packed: Array) -> Array:
    """GEMV_FAST's integers [N, K]: `pack_intweight` of AutoAWQ, backwards."""
    n, k = packed.shape[0] * 4, packed.shape[1]
    words = packed.astype(np.int32).reshape(n // 4, k // 64, 64)
    q = np.stack([((words >> shift) & 15).astype(np.uint8) for shift in (0, 4, 8, 12)], -1)
    q = q.reshape(n // 4, k // 64, 4, 64).swapaxes(1, 2).reshape(n, k // 32, 4, 2, 4)
    q = q.swapaxes(3, 4).reshape(n, k // 32, 4, 4, 2)  # eights in order again
    return q.swapaxes(2, 3).reshape(n, k)


def from_marlin(qweight: Array, scales: Array) -> PackedArrays:
    """Marlin's tensors: see `autoawq.Marlin`."""
    k, n = qweight.shape[0] * _MARLIN_TILE, scales.shape[1]
    packed = np.stack([((qweight >> shift) & 15).astype(np.uint8) for shift in _SHIFTS], -1)
    order, scale_order = _marlin_orders(one_group=scales.shape[0] == 1)
    stored = packed.reshape(-1, len(order))
    q = np.empty_like(stored)
    q[:, order] = stored
    q = q.reshape(k // _MARLIN_TILE, n // _MARLIN_TILE, _MARLIN_TILE, _MARLIN_TILE).swapaxes(1, 2).reshape(k, n)
    permuted = scales.reshape(-1, len(scale_order))
    plain = np.empty_like(permuted)
    plain[:, scale_order] = permuted
    return to_gemm(q, None, plain.reshape(-1, n))


@cache
def _marlin_orders(one_group: bool) -> tuple[Array, Array]:
    """Where Marlin's integers and scales belong: entry i of the stored order is entry order[i] of the plain one."""
    lanes = np.arange(32)
    row, column = 2 * (lanes % 4), lanes // 4
    rows = np.stack([row, row + 1, row + 8, row + 9], 1)  # of a lane, in one block of 8 columns
    blocks = [16 * rows + column[:, None] + 8 * block for block in (0, 1)]
    eight = np.stack(blocks, 1).reshape(len(lanes), -1)  # [lane, 8]
    order = np.concatenate([eight[:, None] + 256 * tile for tile in range(4)], 1)  # [lane, tile, 8]
    mixed = order.reshape(-1, PACK)[:, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(-1)
    if one_group:
        scale_order = np.array([2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)])
    else:
        scale_order = np.array([i + 8 * j for i in range(8) for j in range(8)])
    return mixed, scale_order


def from_gptq(qweight: Array, qzeros: Array | None, scales: Array, version: int) -> PackedArrays:
    """GPTQ's tensors: see `gptq.Gptq`."""
    zero = None
    if qzeros is not None:
        # 1 is added to whole words, as it was subtracted: a zero point of 0 borrowed from its neighbour
        zero = unpack_along(qzeros.astype(np.int64) + (_ONES if version == 1 else 0), 1)
    return to_gemm(unpack_along(qweight, 0), zero, scales)


def from_pack_quantized(packed: Array, zero_point: Array | None, scale: Array) -> PackedArrays:
    """compressed-tensors' tensors: see `compressed_tensors.PackQuantized`."""
    zero = None if zero_point is None else unpack_along(zero_point, 0).T
    return to_gemm(unpack_along(packed, 1).T, zero, scale.T)


def is_in_order(groups_of: Array, groups: int) -> bool:
    """Whether the groups of a linear's inputs are consecutive. groups_of: the group of each."""
    inputs = groups_of.shape[0]
    return np.array_equal(groups_of, np.arange(inputs, dtype=np.int32) // (inputs // groups))
