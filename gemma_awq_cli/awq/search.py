"""The searches of AWQ: one scale per channel for the linears that share an input, and the range of each group.

Source: Lin et al., "AWQ: Activation-aware Weight Quantization" (2306.00978). AutoAWQ runs the block once for each of
20 candidates. Here a candidate needs no matrix product at all: rounding is compensated afterwards, and the error of a
column that then remains is its square times the column's residual (see gptq.py).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gemma_awq_cli.awq.grid import Grid, grid_of_range, minmax_grid, nearest
from gemma_awq_cli.awq.scale_descent import Fed, descend

RATIOS = 20  # exponents are multiples of 1 / RATIOS
PART = 2**22  # elements of a weight that are searched at a time: they stay in the processor's cache
# A scale outside this range takes more of the range of float16 in `scales` than it can gain.
SCALE_LIMIT = 1e3


class Effort(NamedTuple):
    """How much work the searches and the rounding do.

    stride: every stride-th exponent is tried; descent: steps of gradient descent from the best of them; rows: outputs
    of a linear that both look at, evenly spaced; shrinks: the shares of a group's range that are tried; refinements:
    turns of fitting scales and integers to each other after the rounding; sweeps: passes over the columns in each turn;
    correction: strength of the correction for the layers before (see error_propagation.py). With it, the calibration
    rows pass through each layer three times instead of once. feedback: damping of the feedback between rows (see
    output_feedback.py); 0: there is none.
    """

    stride: int
    descent: int
    rows: int
    shrinks: tuple[float, ...]
    refinements: int
    sweeps: int
    correction: float = 0.0
    feedback: float = 0.0

    @property
    def paths(self) -> int:
        """Number of paths that the calibration rows take: the reference path, and with a correction both."""
        return 2 if self.correction else 1


FAST = Effort(stride=10, descent=30, rows=256, shrinks=(1.0, 0.92, 0.84, 0.76), refinements=0, sweeps=0)
BALANCED = Effort(
    stride=4, descent=30, rows=512, shrinks=tuple(1 - 0.04 * step for step in range(11)), refinements=1, sweeps=1
)
BEST = BALANCED._replace(stride=2, descent=60, rows=1024, refinements=4, sweeps=2, correction=0.25, feedback=1.0)


class ScaleChoice(NamedTuple):
    """The result of `search_scale`.

    scale: [K] float32, of the linears; exponents: the best a and b, from which any descent started; error: an estimate
    of `tr(E H E^T)` after compensated rounding; descended: whether the descent improved on the exponents.
    """

    scale: Tensor
    exponents: tuple[float, float]
    error: float
    descended: bool = False


class ScaledInput(NamedTuple):
    """Linears with one input, to search a scale for.

    weights: [N_i, K] float32; residual: [K] of the input, see `Compensation`; importances: [N_i] float32 for each, how
    much a squared error of each output counts, or None if all count the same.
    """

    weights: Sequence[Tensor]
    residual: Tensor
    importances: Sequence[Tensor] | None = None

    def sampled(self, rows: int) -> Fed:
        """Return at most `rows` evenly spaced rows of each weight.

        A row that counts c times as much as others is a row that is the root of c times as large: its range and errors
        grow with it.
        """
        strides = [-(-weight.shape[0] // rows) for weight in self.weights]
        samples = [weight[::stride] for weight, stride in zip(self.weights, strides, strict=True)]
        shares = [weight.shape[0] / sample.shape[0] for weight, sample in zip(self.weights, samples, strict=True)]
        if self.importances is not None:
            factors = [one[::stride].sqrt()[:, None] for one, stride in zip(self.importances, strides, strict=True)]
            samples = [sample * factor for sample, factor in zip(samples, factors, strict=True)]
        return Fed(samples, self.residual, shares)


def weight_magnitude(weights: Sequence[Tensor], group_size: int) -> Tensor:
    """Return the mean over all rows of |w| relative to its group's largest: [K]. AutoAWQ calls it `w_mean`."""
    total = torch.zeros(weights[0].shape[1], device=weights[0].device)
    rows = 0
    for part in (part for weight in weights for part in weight.split(max(1, PART // weight.shape[1]))):
        groups = part.abs().unflatten(1, (-1, group_size))
        relative = groups / groups.amax(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)
        total += relative.flatten(1).sum(0)
        rows += part.shape[0]
    return total / rows


def candidate(mean_abs: Tensor, magnitude: Tensor, exponents: tuple[float, float]) -> Tensor:
    """Return the scale `mean|x|^a / magnitude^b`, normalized: [K]."""
    a, b = exponents
    return normalized(mean_abs.clamp(min=1e-8).pow(a) / magnitude.clamp(min=1e-4).pow(b))


def normalized(scale: Tensor) -> Tensor:
    """Return a multiple of the scale [K] whose largest value is as far above 1 as its smallest is below.

    It is clamped to `SCALE_LIMIT` and its inverse.
    """
    return (scale / (scale.max() * scale.min()).sqrt()).clamp(1 / SCALE_LIMIT, SCALE_LIMIT)


def search_scale(
    weights: Sequence[Tensor],
    mean_abs: Tensor,
    residual: Tensor,
    group_size: int,
    foldable: Callable[[Tensor], Tensor],
    tied: Tensor | None = None,
    effort: Effort = BALANCED,
    importances: Sequence[Tensor] | None = None,
) -> ScaleChoice:
    """Return the scale under which compensated rounding is expected to have the smallest error.

    weights, residual, importances: of the linears that share the input, see `ScaledInput`; mean_abs: [K]; foldable:
    returns the scale nearest to a given one that can be folded exactly, by which candidates are judged; tied: [K]
    integers, equal for columns that must get the same scale, or None if there are none.
    """
    given = ScaledInput(weights, residual, importances)
    return search_common_scale([given], mean_abs, group_size, foldable, tied, effort)


def search_common_scale(
    inputs: Sequence[ScaledInput],
    mean_abs: Tensor,
    group_size: int,
    foldable: Callable[[Tensor], Tensor],
    tied: Tensor | None = None,
    effort: Effort = BALANCED,
) -> ScaleChoice:
    """Return one scale for linears with different inputs, under which the sum of their errors is expected to be least.

    mean_abs: [K] over all inputs. The rest as in `search_scale`.
    """
    parts = [given.sampled(effort.rows) for given in inputs]
    magnitude = weight_magnitude([weight for given in inputs for weight in given.weights], group_size)

    def error_of(scale: Tensor) -> float:
        total = 0.0
        for part in parts:
            cost = part.residual / scale.square()
            for weight, share in zip(part.weights, part.shares, strict=True):
                scaled = weight * scale
                error = nearest(scaled, minmax_grid(scaled, group_size)).sub_(scaled).square_()
                total += share * float(error.sum(0) @ cost)
        return total

    one = torch.ones_like(mean_abs)
    best = ScaleChoice(one, (0.0, 0.0), error_of(one))

    for step in range(effort.stride, RATIOS, effort.stride):
        a = step / RATIOS
        for exponents in ((a, 0.0), (a, 1.0 - a)):
            scale = foldable(candidate(mean_abs, magnitude, exponents))
            error = error_of(scale)
            if error < best.error:
                best = ScaleChoice(scale, exponents, error)
    if effort.descent:
        descended = descend(parts, best.scale, tied, group_size, effort.descent)
        scale = foldable(normalized(descended))
        error = error_of(scale)
        if error < best.error:
            best = ScaleChoice(scale, best.exponents, error, descended=True)
    return best


def search_range(weight: Tensor, residual: Tensor, group_size: int, effort: Effort = BALANCED) -> Grid:
    """Return each group's grid, its range shrunk if clipping the largest weights is expected to lower the output error.

    weight: [N, K] float32, scaled; residual: [K] of the scaled input.
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
