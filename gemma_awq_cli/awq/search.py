"""AWQ's searches: one scale a channel for the linears that share an input, and each group's range.

Source: Lin et al., "AWQ: Activation-aware Weight Quantization" (2306.00978). AutoAWQ runs the block once for each of
20 candidates. Here a candidate costs no product at all: rounding is compensated afterwards, and what then stays of a
column's error is its own square times the column's residual (see rounding.py).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gemma_awq_cli.awq.grid import Grid, grid_of_range, minmax_grid, nearest
from gemma_awq_cli.awq.scale_descent import descend

RATIOS = 20  # exponents are multiples of 1 / RATIOS
PART = 2**22  # elements of a weight that are tried at a time: they stay in the processor's cache
# A scale outside this range costs more float16 range in `scales` than it can gain.
SCALE_LIMIT = 1e3


class Effort(NamedTuple):
    """How hard is searched.

    stride: every so many of the exponents are tried; descent: steps of gradient descent on the best scale; rows:
    outputs of a linear that both look at, evenly spread; shrinks: the shares of a group's range that are tried;
    refinements: turns of fitting scales and integers to each other after the rounding; sweeps: over the columns in
    each; correction: how far weights go towards what makes up for the layers before (see correcting.py), for which
    the calibration rows go through each layer three times instead of once.
    """

    stride: int
    descent: int
    rows: int
    shrinks: tuple[float, ...]
    refinements: int
    sweeps: int
    correction: float = 0.0

    @property
    def paths(self) -> int:
        """How many models' layers the calibration rows travel through: the 16-bit one's, and the quantized one's."""
        return 2 if self.correction else 1


FAST = Effort(stride=10, descent=30, rows=256, shrinks=(1.0, 0.92, 0.84, 0.76), refinements=0, sweeps=0)
BALANCED = Effort(
    stride=4, descent=30, rows=512, shrinks=tuple(1 - 0.04 * step for step in range(11)), refinements=1, sweeps=1
)
BEST = BALANCED._replace(stride=2, descent=60, rows=1024, refinements=4, sweeps=2, correction=0.25)


class ScaleChoice(NamedTuple):
    """scale: [K] float32 that the linears get; exponents: a and b it came from, before any descent; error: estimated
    `tr(E H E^T)` of rounding with compensation; descended: whether descent found it.
    """

    scale: Tensor
    exponents: tuple[float, float]
    error: float
    descended: bool = False


def weight_magnitude(weights: Sequence[Tensor], group_size: int) -> Tensor:
    """Mean over all rows of |w| relative to its group's largest: [K]. (AutoAWQ's `w_mean`.)"""
    total = torch.zeros(weights[0].shape[1], device=weights[0].device)
    rows = 0
    for part in (part for weight in weights for part in weight.split(max(1, PART // weight.shape[1]))):
        groups = part.abs().unflatten(1, (-1, group_size))
        relative = groups / groups.amax(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)
        total += relative.flatten(1).sum(0)
        rows += part.shape[0]
    return total / rows


def candidate(mean_abs: Tensor, magnitude: Tensor, exponents: tuple[float, float]) -> Tensor:
    """The scale `mean|x|^a / magnitude^b`, normalized to a geometric middle of 1: [K]."""
    a, b = exponents
    return normalized(mean_abs.clamp(min=1e-8).pow(a) / magnitude.clamp(min=1e-4).pow(b))


def normalized(scale: Tensor) -> Tensor:
    """The scale [K] with its largest and smallest value equally far from 1, within `SCALE_LIMIT`."""
    return (scale / (scale.max() * scale.min()).sqrt()).clamp(1 / SCALE_LIMIT, SCALE_LIMIT)


def search_scale(
    weights: Sequence[Tensor],
    mean_abs: Tensor,
    residual: Tensor,
    group_size: int,
    realise: Callable[[Tensor], Tensor],
    shared: Tensor | None = None,
    effort: Effort = BALANCED,
) -> ScaleChoice:
    """The scale under which compensated rounding is expected to cost least.

    weights: [N_i, K] float32 of the linears that share the input; mean_abs: [K]; residual: [K], see `Compensation`.
    `realise` turns a wanted scale into the one that can be folded exactly; candidates are judged by that one.
    shared: [K] integers, equal where columns must get the same scale; None if each has its own.
    """
    samples = [weight[:: -(-weight.shape[0] // effort.rows)] for weight in weights]
    shares = [weight.shape[0] / sample.shape[0] for weight, sample in zip(weights, samples, strict=True)]
    magnitude = weight_magnitude(weights, group_size)

    def error_of(scale: Tensor) -> float:
        cost = residual / scale.square()
        total = 0.0
        for weight, share in zip(samples, shares, strict=True):
            scaled = weight * scale
            error = nearest(scaled, minmax_grid(scaled, group_size)).sub_(scaled).square_()
            total += share * float(error.sum(0) @ cost)
        return total

    one = torch.ones_like(mean_abs)
    best = ScaleChoice(one, (0.0, 0.0), error_of(one))

    for step in range(effort.stride, RATIOS, effort.stride):
        a = step / RATIOS
        for exponents in ((a, 0.0), (a, 1.0 - a)):
            scale = realise(candidate(mean_abs, magnitude, exponents))
            error = error_of(scale)
            if error < best.error:
                best = ScaleChoice(scale, exponents, error)
    if effort.descent:
        wanted = descend(samples, shares, residual, best.scale, shared, group_size, effort.descent)
        scale = realise(normalized(wanted))
        error = error_of(scale)
        if error < best.error:
            best = ScaleChoice(scale, best.exponents, error, descended=True)
    return best


def search_range(weight: Tensor, residual: Tensor, group_size: int, effort: Effort = BALANCED) -> Grid:
    """Each group's range, shrunk where clipping the largest weights is expected to lower the output error.

    weight: [N, K] float32; residual: [K] of the same (scaled) input.
    """
    rows = max(1, PART // weight.shape[1])
    parts = [_search_range_of_rows(part, residual, group_size, effort.shrinks) for part in weight.split(rows)]
    return Grid(torch.cat([p.scale for p in parts]), torch.cat([p.zero for p in parts]))


def _search_range_of_rows(weight: Tensor, residual: Tensor, group_size: int, shrinks: Sequence[float]) -> Grid:
    groups = weight.unflatten(1, (-1, group_size))  # [N, G, g]
    cost = residual.view(-1, group_size)
    low, high = groups.amin(-1), groups.amax(-1)
    best_error = torch.full_like(low, torch.inf)
    best = grid_of_range(low, high)
    for shrink in shrinks:
        grid = grid_of_range(low * shrink, high * shrink)
        error = nearest(weight, grid).sub_(weight).square_().unflatten(1, (-1, group_size))
        loss = torch.linalg.vecdot(error, cost)  # [N, G]
        better = loss < best_error
        best_error = torch.where(better, loss, best_error)
        best = Grid(torch.where(better, grid.scale, best.scale), torch.where(better, grid.zero, best.zero))
    return best
