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
PART = 2**17  # weights that are placed at a time: they stay in the processor's cache
_LEVELS = 8  # from 0 to the farthest level: to -8 with a zero point of 8, and to +8 with one of 7
_MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10}  # that are stored


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
        found = _Groups(weight[rows].reshape(-1, KNOWN_GROUP).t().contiguous())
        for peak in PEAKS:
            found.place(peak)
        zeros = found.zero_points()
        q[rows] = (found.levels + zeros).to(torch.uint8).t().reshape(-1, weight.shape[1])
        for whole, part in ((scale, found.scale), (zero, zeros), (placed, found.placed), (exact, found.exact)):
            whole[rows] = part.view(-1, shape[1])
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
    """Groups [32, M], a group a column, of which more and more find their place.

    levels: [32, M] float32, signed integers; scale: [M] float32, exact in float16; placed, exact: [M] bool.
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight, self._size = weight, weight.abs().to(torch.float32)
        self._peak = self._size.amax(0)
        self.levels = torch.zeros_like(self._size)
        self.scale = torch.full_like(self._peak, MIN_SCALE)
        self.placed = self._peak == 0
        self.exact = self.placed.clone()

    def place(self, peak: int) -> None:
        """Place the remaining groups whose largest magnitude is `peak` steps."""
        rest = (~self.placed).nonzero()[:, 0]
        size, step = _chosen(self._size, rest), _chosen(self._peak, rest) / peak
        count = (size / step).round_()
        # a rough look, before the step is fitted; false for NaN
        near = ((count * step).sub_(size).abs_().sub_(size, alpha=2 * TOLERANCE).amax(0) <= 0).nonzero()[:, 0]
        if not near.numel():
            return
        rest, size, count = _chosen(rest, near), _chosen(size, near), _chosen(count, near)
        weight = _chosen(self._weight, rest)
        if peak % 2 == 0:
            _halve(count)
        scale, exact = _step(weight, size, count)
        levels = count.copysign_(weight)
        fits = exact.clone()
        loose = (~exact).nonzero()[:, 0]
        distance = (levels[:, loose].abs() * scale[loose]).sub_(size[:, loose]).abs_()
        fits[loose] = distance.sub_(size[:, loose], alpha=TOLERANCE).amax(0) <= 0
        if peak == _LEVELS:  # both ends would make 17 levels
            fits &= (levels.amax(0) < _LEVELS) | (levels.amin(0) > -_LEVELS)
        kept = fits.nonzero()[:, 0]
        rest = _chosen(rest, kept)
        if rest.numel() == self.placed.numel():
            self.levels = levels
        else:
            self.levels[:, rest] = _chosen(levels, kept)
        self.scale[rest], self.exact[rest], self.placed[rest] = scale[kept], exact[kept], True

    def zero_points(self) -> Tensor:
        """Each group's zero point [M]: 8, or 7 if its integers reach +8, as those of a Q4_0 block with d < 0 do."""
        return torch.where(self.levels.amax(0) == _LEVELS, _LEVELS - 1.0, float(_LEVELS))


def _chosen(groups: Tensor, indices: Tensor) -> Tensor:
    """Some of the groups [..., M]; no copy of them if all are chosen, which is the usual case."""
    return groups if indices.numel() == groups.shape[-1] else groups.index_select(-1, indices)


def _halve(count: Tensor) -> None:
    """Halve the integers of the groups [32, M] that are all even, as often as they are, in place."""
    even = (count.to(torch.int8).bitwise_and_(1).amax(0) == 0).nonzero()[:, 0]
    while even.numel():
        halved = count[:, even] / 2
        count[:, even] = halved
        even = even[halved.to(torch.int8).bitwise_and_(1).amax(0) == 0]


def _step(weight: Tensor, size: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Return each group's step [M], exact in float16, and whether it gives all weights back.

    weight: [32, M]; size: its magnitude in float32; count: the integers, not negative, not all 0. A step that bfloat16
    holds too comes first: some readers round scales to it. Where no step gives all weights back, the one in the middle
    has the smallest relative error.
    """
    # In the bits of float32, all numbers within half a unit in the last place of the 16-bit weight are this near.
    half = 1 << (22 - _MANTISSA_BITS[weight.dtype])
    bits, inverse = size.view(torch.int32), count.reciprocal()
    low = (bits - half).view(torch.float32).mul_(inverse).masked_fill_(count == 0, 0)  # 0 allows every step
    high = (bits + half).view(torch.float32).mul_(inverse)
    middle = (low.amax(0) + high.amin(0)).div_(2)
    scale = middle.to(torch.bfloat16).to(torch.float16).float()
    exact = _gives_back(scale, count, weight, size)
    rest = (~exact).nonzero()[:, 0]
    if rest.numel():
        scale[rest] = middle[rest].to(torch.float16).float()
        exact[rest] = _gives_back(scale[rest], *(_chosen(groups, rest) for groups in (count, weight, size)))
    return scale, exact


def _gives_back(scale: Tensor, count: Tensor, weight: Tensor, size: Tensor) -> Tensor:
    """Whether all integers of a group times its scale round to the weights: [M] bool."""
    # the product of 4 and 11 significant bits is exact in float32, so that it is rounded once
    return (count * scale).to(weight.dtype).to(torch.float32).sub_(size).abs_().amax(0) == 0
