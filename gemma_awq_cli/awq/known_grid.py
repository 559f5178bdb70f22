"""The 4-bit grid that a 16-bit weight already lies on, as quantization-aware training for Q4_0 leaves it.

Such a weight is an integer of -8..8 times the step of its group of 32, rounded to 16 bits. The integers and the step
are not stored, but they follow from the weights: if the group's largest magnitude is `m` steps for one of m = 1..8, the
step is known to within half a unit in the last place, which decides every integer. Then each weight allows an interval
of steps, those whose product with the integer rounds to the weight, and the intersection of a group's intervals holds
every step that gives all of its weights back.

A weight that was not trained for such a grid is not found on one by accident: an integer k accepts a weight within
k / 128 of a step on either side, which is 7 % of the range at 8 levels, and all 32 weights must be accepted.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gemma_awq_cli.awq.grid import MIN_SCALE, Grid, quantize
from gemma_awq_cli.awq.round_group import Rounded
from gemma_awq_cli.awq.search import Effort, search_range

KNOWN_GROUP = 32  # weights of a Q4_0 block
TOLERANCE = 2.0**-7  # of a weight, for its distance from the grid: twice the rounding to bfloat16
# A grid whose largest magnitude is 1, 2 or 4 steps is part of one with 8, and one with 3 steps is part of one with 6.
PEAKS = (8, 7, 6, 5)
PART = 2**20  # weights that are placed at a time: they stay in the processor's cache
_NEGATIVE_MOST = 8  # the zero point whose lowest level is -8; of 7 the highest is +8


class KnownGrid(NamedTuple):
    """The integers and grids of a weight [N, K], with one mask per group: [N, G] bool.

    placed: every weight of the group is within TOLERANCE of the stored grid; exact: every weight comes back bit for bit
    when it is dequantized to its own dtype (-0 comes back as 0). Groups that are not placed hold no integers.
    """

    rounded: Rounded
    placed: Tensor
    exact: Tensor


def find_grid(weight: Tensor) -> KnownGrid:
    """Find the grids of a weight [N, K] bfloat16 or float16, K a multiple of KNOWN_GROUP, group by group."""
    shape = (weight.shape[0], weight.shape[1] // KNOWN_GROUP)
    q = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    scale, zero = (torch.empty(shape, device=weight.device) for _ in range(2))
    placed, exact = (torch.empty(shape, dtype=torch.bool, device=weight.device) for _ in range(2))
    count = max(1, PART // weight.shape[1])
    for start in range(0, weight.shape[0], count):
        rows = slice(start, start + count)
        found = _Groups(weight[rows].reshape(-1, KNOWN_GROUP))
        for peak in PEAKS:
            found.place(peak)
        levels, zeros = found.levels, found.zero_points()
        q[rows] = (levels + zeros[:, None]).view(-1, weight.shape[1])
        zero[rows], scale[rows] = zeros.view(-1, shape[1]).float(), found.scale.view(-1, shape[1])
        placed[rows], exact[rows] = found.placed.view(-1, shape[1]), found.exact.view(-1, shape[1])
    return KnownGrid(Rounded(q, Grid(scale, zero)), placed, exact)


def round_others(known: KnownGrid, weight: Tensor, effort: Effort) -> None:
    """Round the groups that are not placed, in place: to nearest, on the range with the least squared error.

    weight: [N, K] as in `find_grid`. Nothing else changes, so placed groups stay exactly as they are.
    """
    others = ~known.placed
    if not others.any():
        return
    groups = weight.unflatten(1, (-1, KNOWN_GROUP))[others].float()  # [M, 32]
    grid = search_range(groups, torch.ones(KNOWN_GROUP, device=weight.device), KNOWN_GROUP, effort)
    known.rounded.q.unflatten(1, (-1, KNOWN_GROUP))[others] = quantize(groups, grid).to(torch.uint8)
    known.rounded.grid.scale[others], known.rounded.grid.zero[others] = grid.scale[:, 0], grid.zero[:, 0]


class _Groups:
    """Groups [M, 32] of which more and more find their place.

    levels: [M, 32] int8 signed integers; scale: [M] float32, exact in float16; placed, exact: [M] bool.
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight, self._size = weight, weight.abs().float()
        self._peak = self._size.amax(1)
        self.levels = torch.zeros(weight.shape, dtype=torch.int8, device=weight.device)
        self.scale = torch.full_like(self._peak, MIN_SCALE)
        self.placed = self._peak == 0
        self.exact = self.placed.clone()

    def place(self, peak: int) -> None:
        """Place the remaining groups whose largest magnitude is `peak` steps."""
        rest = (~self.placed).nonzero()[:, 0]
        whole = rest.numel() == self.placed.numel()  # the usual case, without a copy
        size, step = (t if whole else t[rest] for t in (self._size, self._peak))
        step = (step / peak)[:, None]
        count = (size / step).round_()
        # a rough look, before the step is fitted; false for NaN
        near = ((count * step).sub_(size).abs_() <= 2 * TOLERANCE * size).all(1)
        rest, count = rest[near], count[near].to(torch.int8)
        if not rest.numel():
            return
        size, weight = size[near], self._weight[rest]
        if peak % 2 == 0:
            _halve(count)
        scale, exact = _step(weight, size, count)
        within = ((count * scale[:, None]).sub_(size).abs_() <= TOLERANCE * size).all(1)
        levels = torch.where(weight < 0, -count, count)
        within &= (levels.amax(1) < _NEGATIVE_MOST) | (levels.amin(1) > -_NEGATIVE_MOST)  # 17 levels are one too many
        rest = rest[within]
        self.levels[rest], self.scale[rest] = levels[within], scale[within]
        self.exact[rest], self.placed[rest] = exact[within], True

    def zero_points(self) -> Tensor:
        """Each group's zero point: 8, or 7 if its integers reach +8, as those of a Q4_0 block with d < 0 do."""
        return torch.where(self.levels.amax(1) == _NEGATIVE_MOST, _NEGATIVE_MOST - 1, _NEGATIVE_MOST).to(torch.int8)


def _halve(count: Tensor) -> None:
    """Halve the integers of the groups [M, 32] that are all even, as often as they are, in place."""
    even = ((count & 1) == 0).all(1).nonzero()[:, 0]
    while even.numel():
        halved = count[even] // 2
        count[even] = halved
        even = even[((halved & 1) == 0).all(1)]


def _step(weight: Tensor, size: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Return each group's step [M], exact in float16, and whether it gives all weights back.

    weight: [M, 32]; size: its magnitude in float32; count: the integers, not negative, not all 0. A step that bfloat16
    holds too comes first: some readers round scales to it. Where no step gives all weights back, the one in the middle
    has the smallest relative error.
    """
    bits = weight.abs().view(torch.int16)
    above, below = (bits + 1).view(weight.dtype).float(), (bits - 1).view(weight.dtype).float()
    steps = count.float()
    none = count == 0
    # halfway to the neighbours; a weight of 0 allows every step
    low = below.add_(size).div_(2).div_(steps).masked_fill_(none, 0).amax(1)
    high = above.add_(size).div_(2).div_(steps).masked_fill_(none, torch.inf).amin(1)
    middle = (low + high) / 2
    short, long = middle.to(torch.bfloat16).to(torch.float16).float(), middle.to(torch.float16).float()
    exact = _gives_back(short, steps, weight, size)
    scale = torch.where(exact, short, long)
    rest = (~exact).nonzero()[:, 0]
    exact[rest] = _gives_back(scale[rest], steps[rest], weight[rest], size[rest])
    return scale, exact


def _gives_back(scale: Tensor, steps: Tensor, weight: Tensor, size: Tensor) -> Tensor:
    """Whether all integers of a group times its scale round to the weights: [M] bool."""
    # the product of 4 and 11 significant bits is exact in float32, so that it is rounded once
    return ((steps * scale[:, None]).to(weight.dtype).float() == size).all(1)
