"""Other layouts' tensors brought to AutoAWQ's GEMM layout, with torch: tensors in, tensors out."""

from functools import cache

import torch
from torch import Tensor

from gemma_awq_cli.awq.packing import PackedWeight, pack_columns
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.packed_formats.packed_format import PACK

SYMMETRIC_ZERO = 8  # the zero point of layouts that store none
_EIGHTS = 0x88888888 - 2**32  # a word of them
_ONES = 0x11111111
_SHIFTS = tuple(range(0, 32, 4))
_MARLIN_TILE = 16


def unpack_along(packed: Tensor, dim: int) -> Tensor:
    """Unpack words that hold eight 4-bit integers in order, along `dim` (0 or 1): uint8."""
    nibbles = torch.stack([(packed >> shift) & 15 for shift in _SHIFTS], dim + 1)
    return nibbles.flatten(dim, dim + 1).to(torch.uint8)


def to_gemm(q: Tensor, zero: Tensor | None, scale: Tensor) -> PackedWeight:
    """AutoAWQ's GEMM tensors of integers q [K, N], zero points [G, N] (None: symmetric) and scales [G, N]."""
    if zero is None:
        zero = torch.full(scale.shape, SYMMETRIC_ZERO, dtype=torch.uint8)
    return PackedWeight(pack_columns(q), pack_columns(zero), exact_scales(scale))


def exact_scales(scale: Tensor) -> Tensor:
    """Scales in float16 where that holds them exactly, or else in float32. The sign of 0 does not count."""
    if scale.dtype == torch.float16:
        return scale.contiguous()
    half = scale.to(torch.float16)
    return half.contiguous() if torch.equal(half.float(), scale.float()) else scale.to(torch.float32).contiguous()


def split_groups(packed: PackedWeight, parts: int) -> PackedWeight:
    """The same weight in smaller groups: `parts` of each, all with the group's scale and zero point."""
    if parts == 1:
        return packed
    qzeros, scales = (tensor.repeat_interleave(parts, 0) for tensor in packed[1:])
    return PackedWeight(packed.qweight, qzeros, scales)


def without_zeros(qweight: Tensor, scales: Tensor) -> PackedWeight:
    """GEMM tensors that lack the zero points of a symmetric file."""
    eights = torch.full((scales.shape[0], scales.shape[1] // PACK), _EIGHTS, dtype=torch.int32)
    return PackedWeight(qweight, eights, exact_scales(scales))


def from_gemv(qweight: Tensor, qzeros: Tensor, scales: Tensor, groups: int) -> PackedWeight:
    """GEMV's tensors: see `autoawq.Gemv`. groups: how many of the padded ones count."""
    q, zero = unpack_along(qweight, 1), unpack_along(qzeros, 1)
    return to_gemm(q.t(), zero[:, :groups].t(), scales[:, :groups].t())


def from_gemv_fast(name: str, qweight: Tensor, qzeros: Tensor, scales: Tensor, groups: int) -> PackedWeight:
    """GEMV_FAST's tensors: see `autoawq.GemvFast`. The zero points are the integers in the stored products."""
    wide, offsets = (tensor[:groups].float() for tensor in (scales, qzeros))
    zero = torch.where(wide == 0, 0.0, -offsets / torch.where(wide == 0, 1.0, wide))
    # the product was rounded to float16: 15 is off by at most 0.01
    if not bool(((zero - zero.round()).abs() < 0.1).all() & (zero.round() >= 0).all() & (zero.round() <= 15).all()):
        raise GemmaAwqError(
            f"{name}.qzeros do not hold zero points of 0 to 15 times the scales.", "The file is damaged: get it again."
        )
    return to_gemm(_interleaved(qweight).t(), zero.round(), scales[:groups])


def _interleaved(packed: Tensor) -> Tensor:
    """GEMV_FAST's integers [N, K]: `pack_intweight` of AutoAWQ, backwards."""
    n, k = packed.shape[0] * 4, packed.shape[1]
    words = packed.to(torch.int32).view(n // 4, k // 64, 64)
    q = torch.stack([(words >> shift) & 15 for shift in (0, 4, 8, 12)], -1).to(torch.uint8)
    q = q.view(n // 4, k // 64, 4, 64).transpose(1, 2).reshape(n, k // 32, 4, 2, 4)
    q = q.transpose(3, 4).reshape(n, k // 32, 4, 4, 2)  # eights in order again
    return q.transpose(2, 3).reshape(n, k)


def from_marlin(qweight: Tensor, scales: Tensor) -> PackedWeight:
    """Marlin's tensors: see `autoawq.Marlin`."""
    k, n = qweight.shape[0] * _MARLIN_TILE, scales.shape[1]
    packed = torch.stack([(qweight >> shift) & 15 for shift in _SHIFTS], -1).to(torch.uint8)
    order, scale_order = _marlin_orders(one_group=scales.shape[0] == 1)
    q = torch.empty_like(packed.view(-1, len(order)))
    q[:, order] = packed.view(-1, len(order))
    q = q.view(k // _MARLIN_TILE, n // _MARLIN_TILE, _MARLIN_TILE, _MARLIN_TILE).transpose(1, 2).reshape(k, n)
    plain = torch.empty_like(scales).view(-1, len(scale_order))
    plain[:, scale_order] = scales.reshape(-1, len(scale_order))
    return to_gemm(q, None, plain.view(-1, n))


@cache
def _marlin_orders(one_group: bool) -> tuple[Tensor, Tensor]:
    """Where Marlin's integers and scales belong: entry i of the stored order is entry order[i] of the plain one."""
    lanes = torch.arange(32)
    row, column = 2 * (lanes % 4), lanes // 4
    rows = torch.stack([row, row + 1, row + 8, row + 9], 1)  # of a lane, in one block of 8 columns
    eight = torch.stack([16 * rows + column[:, None] + 8 * block for block in (0, 1)], 1).flatten(1)  # [lane, 8]
    order = torch.cat([eight[:, None] + 256 * tile for tile in range(4)], 1)  # [lane, tile, 8]
    mixed = order.reshape(-1, PACK)[:, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(-1)
    if one_group:
        scale_order = torch.tensor([2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)])
    else:
        scale_order = torch.tensor([i + 8 * j for i in range(8) for j in range(8)])
    return mixed, scale_order


def from_gptq(qweight: Tensor, qzeros: Tensor | None, scales: Tensor, version: int) -> PackedWeight:
    """GPTQ's tensors: see `gptq.Gptq`."""
    zero = None
    if qzeros is not None:
        # 1 is added to whole words, as it was subtracted: a zero point of 0 borrowed from its neighbour
        zero = unpack_along(qzeros.to(torch.int64) + (_ONES if version == 1 else 0), 1)
    return to_gemm(unpack_along(qweight, 0), zero, scales)


def from_pack_quantized(packed: Tensor, zero_point: Tensor | None, scale: Tensor) -> PackedWeight:
    """compressed-tensors' tensors: see `compressed_tensors.PackQuantized`."""
    zero = None if zero_point is None else unpack_along(zero_point, 0).t()
    return to_gemm(unpack_along(packed, 1).t(), zero, scale.t())


def is_in_order(groups_of: Tensor, groups: int) -> bool:
    """Whether the groups of a linear's inputs are consecutive. groups_of: the group of each."""
    inputs = groups_of.shape[0]
    return torch.equal(groups_of, torch.arange(inputs, dtype=torch.int32) // (inputs // groups))
