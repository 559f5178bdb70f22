"""The layout: its own round trip, its definition by hand, and AutoAWQ's own code as the judge."""

import pytest
import torch

from gemma_awq_cli.awq.grid import dequantize, minmax_grid, quantize
from gemma_awq_cli.awq.packing import pack_columns, pack_weight, unpack_columns, unpack_weight
from gemma_awq_cli.kernels.autoawq import autoawq_version, dequantize_with_autoawq


def test_columns_round_trip() -> None:
    values = torch.randint(0, 16, (12, 40), generator=torch.Generator().manual_seed(1))
    assert torch.equal(unpack_columns(pack_columns(values)).long(), values)


def test_nibbles_lie_in_autoawqs_order() -> None:
    """One int32 written out by hand: nibble i holds column [0, 2, 4, 6, 1, 3, 5, 7][i]."""
    packed = int(pack_columns(torch.tensor([[10, 11, 12, 13, 14, 15, 1, 2]]))) & 0xFFFFFFFF
    assert packed == 0x2_F_D_B_1_E_C_A


def test_weight_round_trip() -> None:
    weight = torch.randn(48, 128)
    grid = minmax_grid(weight, 32)
    q = quantize(weight, grid)
    q_read, grid_read = unpack_weight(pack_weight(q, grid))
    assert torch.equal(q_read.float(), q)
    assert torch.equal(grid_read.scale, grid.scale)
    assert torch.equal(grid_read.zero, grid.zero)


@pytest.mark.skipif(autoawq_version() is None, reason="AutoAWQ is not installed")
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_autoawq_unpacks_the_same_weight(group_size: int) -> None:
    weight = torch.randn(64, 256)
    grid = minmax_grid(weight, group_size)
    q = quantize(weight, grid)
    theirs = dequantize_with_autoawq(pack_weight(q, grid), group_size)
    assert theirs is not None
    assert torch.equal(theirs.float(), dequantize(q, grid).t().half().float())
