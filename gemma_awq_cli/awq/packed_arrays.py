"""The tensors of one packed linear as numpy arrays, for code that runs without torch. The layout is packing.py's."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gemma_awq_cli.system.arrays import Array

PACK = 8
NIBBLE_COLUMN = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i (bits 4i..4i+3) holds column NIBBLE_COLUMN[i] of its eight


class PackedArrays(NamedTuple):
    """qweight int32 [K, N/8], qzeros int32 [K/g, N/8]; scales [K/g, N] in float16, or in float32 where that is too
    coarse.
    """

    qweight: Array
    qzeros: Array
    scales: Array


def side_by_side(parts: Sequence[PackedArrays]) -> PackedArrays:
    """Linears of the same inputs as one, whose outputs lie side by side."""
    if len(parts) == 1:
        return parts[0]
    return PackedArrays(*(np.concatenate(arrays, 1) for arrays in zip(*parts, strict=True)))


def split_groups(packed: PackedArrays, parts: int) -> PackedArrays:
    """The same weight in smaller groups: `parts` of each, all with the group's scale and zero point."""
    if parts == 1:
        return packed
    return packed._replace(qzeros=np.repeat(packed.qzeros, parts, 0), scales=np.repeat(packed.scales, parts, 0))


def pack_columns(values: Array) -> Array:
    """Pack integers 0..15 [R, C] of any dtype into int32 [R, C/8]."""
    eights = values.reshape(values.shape[0], -1, PACK).astype(np.uint32)
    packed = np.zeros(eights.shape[:2], np.uint32)
    for nibble, column in enumerate(NIBBLE_COLUMN):
        packed |= eights[:, :, column] << np.uint32(4 * nibble)
    return packed.view(np.int32)


def exact_scales(scale: Array) -> Array:
    """Scales in float16 where that holds them exactly, or else in float32. The sign of 0 does not count."""
    if scale.dtype == np.float16:
        return np.ascontiguousarray(scale)
    wide = np.ascontiguousarray(scale.astype(np.float32))
    with np.errstate(over="ignore"):  # what overflows is not equal
        half = wide.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), wide) else wide
