"""The same 4-bit integers in the order that other formats than AutoAWQ's hold them: rows of outputs, nibbles in order.

All of them keep the grid of `grid.py`, `w = (q - zero) * scale`; see `packing.py` for the layout that they start from.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gemma_awq_cli.awq.packed_arrays import PACK
from gemma_awq_cli.awq.packing import PackedWeight, unpack_columns


class RowPacked(NamedTuple):
    """A linear of K inputs and N outputs with its integers packed along the inputs.

    q: int32 [N, K/8], bits 4i..4i+3 hold column i of their eight; zero: uint8 [N, G], 0..15; scale: [N, G] float16 or
    float32, as the source has it.
    """

    q: Tensor
    zero: Tensor
    scale: Tensor


def pack_in_order(values: Tensor) -> Tensor:
    """Pack integers 0..15 [R, C] of any dtype into int32 [R, C/8], the first of eight in the lowest bits."""
    eights = values.to(torch.int32).unflatten(1, (-1, PACK))
    packed = eights[:, :, 0].clone()
    for nibble in range(1, PACK):
        packed |= eights[:, :, nibble] << (4 * nibble)
    return packed


def unpack_in_order(packed: Tensor) -> Tensor:
    """Unpack int32 [R, C/8] into uint8 integers 0..15 [R, C]."""
    nibbles = [((packed >> (4 * nibble)) & 15).to(torch.uint8) for nibble in range(PACK)]
    return torch.stack(nibbles, dim=-1).flatten(1)


def repack_rows(packed: PackedWeight) -> RowPacked:
    """Return the integers, zero points and scales of AutoAWQ's layout with one row per output."""
    return RowPacked(
        pack_in_order(unpack_columns(packed.qweight).t()),
        unpack_columns(packed.qzeros).t().contiguous(),
        packed.scales.t().contiguous(),
    )
