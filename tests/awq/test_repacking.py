"""Integers packed along the inputs: the definition by hand, a round trip, and the same weight as AutoAWQ's layout."""

import pytest
import torch

from gemma_awq_cli.awq.grid import Grid, dequantize, minmax_grid, quantize
from gemma_awq_cli.awq.packing import pack_weight, unpack_weight
from gemma_awq_cli.awq.repacking import pack_in_order, repack_rows, unpack_in_order


def test_the_first_of_eight_lies_in_the_lowest_bits() -> None:
    packed = int(pack_in_order(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 15]]))) & 0xFFFFFFFF
    assert packed == 0xF_7_6_5_4_3_2_1


def test_rows_round_trip() -> None:
    values = torch.randint(0, 16, (12, 40), generator=torch.Generator().manual_seed(1))
    assert torch.equal(unpack_in_order(pack_in_order(values)).long(), values)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_the_weight_stays_the_same(group_size: int) -> None:
    weight = torch.randn(48, 256, generator=torch.Generator().manual_seed(group_size))
    grid = minmax_grid(weight, group_size)
    packed = pack_weight(quantize(weight, grid), grid)
    rows = repack_rows(packed)
    read = Grid(rows.scale.float(), rows.zero.float())
    assert rows.scale.dtype == torch.float16
    assert torch.equal(dequantize(unpack_in_order(rows.q), read), dequantize(*unpack_weight(packed)))
