"""Weights that already lie on a 4-bit grid: found, and given back bit for bit; other weights are not found on one."""

import pytest
import torch
from torch import Tensor

from gemma_awq_cli.awq.grid import QMAX, dequantize
from gemma_awq_cli.awq.known_grid import KNOWN_GROUP, KnownGrid, find_grid, round_others
from gemma_awq_cli.awq.packing import pack_weight, unpack_weight
from gemma_awq_cli.awq.search import BALANCED

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def q4_0(rows: int, groups: int, step: torch.dtype, seed: int = 0) -> Tensor:
    """Weights of Q4_0 blocks in bfloat16, [rows, groups * 32]: steps of both signs, peak levels of 1 to 8, zeros."""
    generator = torch.Generator().manual_seed(seed)
    blocks = (rows, groups, 1)
    d = torch.rand(blocks, generator=generator) * 4e-3 + 2e-4
    d = torch.where(torch.rand(blocks, generator=generator) < 0.5, -d, d).to(step).float()
    width = torch.rand(blocks, generator=generator) * 4
    q = (torch.randn(rows, groups, KNOWN_GROUP, generator=generator) * width).round().clamp(-8, 7)
    return (q * d).to(torch.bfloat16).flatten(1)


def stored(known: KnownGrid) -> Tensor:
    """The weight that a reader of the packed tensors gets in float32."""
    return dequantize(*unpack_weight(pack_weight(*known.rounded)))


@pytest.mark.parametrize("step", DTYPES[:2], ids=str)
def test_q4_0_blocks_come_back_bit_for_bit(step: torch.dtype) -> None:
    weight = q4_0(256, 40, step)
    groups = weight.float().unflatten(1, (-1, KNOWN_GROUP))
    known = find_grid(weight)
    assert known.placed.all()
    assert known.exact.all()
    assert torch.equal(stored(known).to(torch.bfloat16), weight)
    zero = known.rounded.grid.zero
    assert set(zero.unique().tolist()) == {7.0, 8.0}
    assert known.rounded.q.max() <= QMAX
    steps = (groups.abs().amax(-1) / known.rounded.grid.scale).round()
    assert set(steps.unique().tolist()) == {float(peak) for peak in range(9)}  # 0: a group of zeros


def test_steps_of_bfloat16_stay_steps_of_bfloat16() -> None:
    """Readers that compute in bfloat16 round the scales to it."""
    scale = find_grid(q4_0(64, 40, torch.bfloat16)).rounded.grid.scale
    assert torch.equal(scale.to(torch.bfloat16).float(), scale)


def test_steps_that_float16_does_not_hold_are_counted_and_not_claimed() -> None:
    weight = q4_0(512, 40, torch.float32)
    known = find_grid(weight)
    back = stored(known).to(torch.bfloat16)
    same = (back == weight).unflatten(1, (-1, KNOWN_GROUP)).all(-1)
    assert known.placed.all()
    assert torch.equal(known.exact, same)
    assert 0.98 < known.exact.float().mean() < 1
    assert ((back.float() - weight.float()).abs() <= 2**-7 * weight.float().abs()).all()


@pytest.mark.parametrize("exponent", [-16, -17, -19, -22, -26, -30])
def test_the_smallest_steps(exponent: int) -> None:
    """float16 holds a bfloat16 step down to 2^-17. Below, only what comes back is called exact."""
    generator = torch.Generator().manual_seed(1)
    d = ((1 + torch.arange(128) / 128) * 2.0**exponent).view(128, 1)
    q = torch.randint(-8, 8, (128, KNOWN_GROUP), generator=generator)
    weight = (q * d).to(torch.bfloat16)
    known = find_grid(weight)
    same = (stored(known).to(torch.bfloat16) == weight).all(1, keepdim=True)
    assert torch.equal(known.exact, same & known.placed)
    assert known.exact.all() == (exponent >= -17)
    assert known.placed.any() == (exponent >= -24)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("kind", ["normal", "uniform", "heavy tails", "tiny", "asymmetric grid", "mean of the group"])
def test_other_weights_are_not_found_on_a_grid(kind: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(1024, 1024, generator=generator)
    groups = weight.unflatten(1, (-1, KNOWN_GROUP))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    made = {
        "normal": 0.02 * weight,
        "uniform": 0.02 * torch.rand(weight.shape, generator=generator) - 0.01,
        "heavy tails": 0.01 * weight * weight.abs().square(),
        "tiny": 2e-5 * weight,
        # 16 levels from the least to the largest, none of which is 0
        "asymmetric grid": (low + ((groups - low) / (high - low) * 15).round() * (high - low) / 15).flatten(1),
        # a symmetric grid that is not around 0
        "mean of the group": ((groups / high * 7).round() * high / 7 + groups.mean(-1, keepdim=True)).flatten(1),
    }
    known = find_grid(made[kind].to(dtype))
    assert known.placed.float().mean() < (1e-5 if kind not in ("asymmetric grid", "mean of the group") else 2e-3)


def test_a_grid_of_17_levels_does_not_fit() -> None:
    q = torch.arange(-16, 16).clamp(-8, 8).expand(8, -1)
    known = find_grid((q * 0.01).to(torch.bfloat16))
    assert not known.placed.any()
    both_ends = (q.sign() * 0.01).to(torch.bfloat16)  # but levels that are all even are half as many
    assert torch.equal(stored(find_grid(both_ends)).to(torch.bfloat16), both_ends)


def test_broken_weights_are_not_placed() -> None:
    weight = torch.zeros(3, KNOWN_GROUP, dtype=torch.bfloat16)
    weight[0, 0], weight[1, 0], weight[2] = torch.nan, torch.inf, torch.finfo(torch.bfloat16).max
    assert not find_grid(weight)[1].any()


def test_the_other_groups_are_rounded_and_the_placed_ones_stay() -> None:
    weight = q4_0(64, 20, torch.bfloat16)
    odd = torch.rand(64, 20, generator=torch.Generator().manual_seed(3)) < 0.1
    noise = torch.randn(64, 20, KNOWN_GROUP, generator=torch.Generator().manual_seed(4)) * 0.01
    weight.unflatten(1, (-1, KNOWN_GROUP))[odd] = noise.to(torch.bfloat16)[odd]
    known = find_grid(weight)
    assert torch.equal(known.placed, ~odd)
    round_others(known, weight, BALANCED)
    back = stored(known).unflatten(1, (-1, KNOWN_GROUP))
    groups = weight.unflatten(1, (-1, KNOWN_GROUP))
    assert torch.equal(back[~odd].to(torch.bfloat16), groups[~odd])
    error = (back[odd] - groups[odd].float()).norm() / groups[odd].float().norm()
    assert error < 0.09
