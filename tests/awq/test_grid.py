"""The 4-bit grid: what float16 and bfloat16 readers see, and groups that lie on one side of zero."""

import pytest
import torch

from gemma_awq_cli.awq.grid import MIN_SCALE, minmax_grid, nearest, storable_scale


def test_both_16_bit_dtypes_hold_a_scale_exactly() -> None:
    scale = storable_scale(torch.logspace(-9, 4, 5000))
    assert torch.equal(scale.to(torch.float16).float(), scale)
    assert torch.equal(scale.to(torch.bfloat16).float(), scale)


@pytest.mark.parametrize("shift", [-5.0, 0.0, 5.0])
def test_rounding_stays_within_half_a_step(shift: float) -> None:
    """Also for groups that do not contain 0: the zero point must fit 0..15 without clipping a weight."""
    weight = torch.randn(16, 128) + shift
    grid = minmax_grid(weight, 32)
    error = (nearest(weight, grid) - weight).abs().unflatten(1, (-1, 32)).amax(-1)
    # the scale and the zero point are rounded too: up to another half step at the ends of the range
    assert (error <= grid.scale * 1.1).all()


def test_a_group_of_zeros_stays_zero() -> None:
    weight = torch.zeros(8, 64)
    grid = minmax_grid(weight, 32)
    assert (grid.scale == MIN_SCALE).all()
    assert torch.equal(nearest(weight, grid), weight)
