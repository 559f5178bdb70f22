"""The AutoAWQ GEMM layout: eight 4-bit columns in one int32, in AutoAWQ's interleaved order.

For a linear of K inputs and N outputs: qweight int32 [K, N/8], qzeros int32 [K/g, N/8], scales float16 [K/g, N].
Source of the order: AutoAWQ `awq/utils/packing_utils.py` and `awq/modules/linear/gemm.py`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gemma_awq_cli.awq.grid import Grid
from gemma_awq_cli.awq.packed_arrays import NIBBLE_COLUMN, PACK, PackedArrays
from gemma_awq_cli.system.arrays import as_array, as_tensor


class PackedWeight(NamedTuple):
    """The three tensors of one quantized linear, named as in the file."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor


def as_packed_arrays(packed: PackedWeight) -> PackedArrays:
    """The arrays of tensors on the CPU, of the same memory where they are contiguous."""
    return PackedArrays(*(as_array(tensor.contiguous()) for tensor in packed))


def as_packed_weight(packed: PackedArrays) -> PackedWeight:
    """The tensors of arrays, of the same memory."""
    return PackedWeight(*map(as_tensor, packed))


def pack_columns(values: Tensor) -> Tensor:
    """Pack integers 0..15 [R, C] of any dtype into int32 [R, C/8]."""
    eights = values.to(torch.int32).unflatten(1, (-1, PACK))
    packed = torch.zeros(eights.shape[:2], dtype=torch.int32, device=values.device)
    for nibble, column in enumerate(NIBBLE_COLUMN):
        packed |= eights[:, :, column] << (4 * nibble)
    return packed


def unpack_columns(packed: Tensor) -> Tensor:
    """Unpack int32 [R, C/8] into uint8 integers 0..15 [R, C]."""
    eights = torch.empty((*packed.shape, PACK), dtype=torch.uint8, device=packed.device)
    for nibble, column in enumerate(NIBBLE_COLUMN):
        eights[:, :, column] = ((packed >> (4 * nibble)) & 15).to(torch.uint8)
    return eights.flatten(1)


def pack_weight(q: Tensor, grid: Grid) -> PackedWeight:
    """Return the tensors of the file for integers [N, K] on `grid`."""
    return PackedWeight(
        qweight=pack_columns(q.t()),
        qzeros=pack_columns(grid.zero.t()),
        scales=grid.scale.t().to(torch.float16).contiguous(),
    )


def unpack_weight(packed: PackedWeight) -> tuple[Tensor, Grid]:
    """Return the integers [N, K] uint8 and the grid that the tensors of the file hold."""
    q = unpack_columns(packed.qweight).t().contiguous()
    scale = packed.scales.t().to(torch.float32).contiguous()
    zero = unpack_columns(packed.qzeros).t().to(torch.float32).contiguous()
    return q, Grid(scale, zero)
