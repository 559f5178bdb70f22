"""Rounding the linears of a group together: they share the Gram matrix, its factor and the order of the columns.

Shapes: weight [N, K] float32, the rows of all linears of the group; columns [K] and rows [N, 1] float32, the scales
that the weight is multiplied by before it is rounded; gram [B, k, k] of the unscaled input, B k = K.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gemma_awq_cli.awq.coordinate_descent import refine
from gemma_awq_cli.awq.gptq import DAMPING, damping_amount, factor_gram, quantize_compensated
from gemma_awq_cli.awq.gram import output_error, scaled_gram
from gemma_awq_cli.awq.grid import Grid, dequantize, minmax_grid, quantize
from gemma_awq_cli.awq.output_feedback import OutputFeedback
from gemma_awq_cli.awq.precision import matmul_precision
from gemma_awq_cli.awq.row_shares import ALONE, RowShares
from gemma_awq_cli.awq.search import Effort, search_range

PART = 2**23  # elements that are rounded at a time: rows are independent
GPU_PART = 2**26  # the same on a GPU, where each column of a part starts some kernels, however many rows it has


class Rounded(NamedTuple):
    """A rounded weight. q: [N, K] uint8 integers 0..15; grid: [N, G]."""

    q: Tensor
    grid: Grid

    def rows(self, part: slice) -> "Rounded":
        return Rounded(self.q[part], Grid(self.grid.scale[part], self.grid.zero[part]))


def round_nearest(weight: Tensor, columns: Tensor, rows: Tensor, group_size: int) -> Rounded:
    """Round to nearest, each group of a row on its own range."""
    result = _empty(weight, group_size)
    for part in _parts(weight):
        scaled = (weight[part] * columns).mul_(rows[part])
        grid = minmax_grid(scaled, group_size)
        _put(result, part, slice(None), slice(None), quantize(scaled, grid), grid)
    return result


def round_compensated(
    weight: Tensor,
    columns: Tensor,
    rows: Tensor,
    gram: Tensor,
    group_size: int,
    effort: Effort,
    feedback: OutputFeedback | None = None,
    shares: RowShares = ALONE,
) -> Rounded:
    """Search the ranges, round with compensation and refine, one block of the Gram matrix after the other.

    feedback: between the rows of the weight; None: each is rounded alone. shares: of the rows that can be rounded at
    the same time.
    """
    result = _empty(weight, group_size)
    mine = shares.own(weight.shape[0])
    width = gram.shape[1]
    for index in range(gram.shape[0]):
        block = slice(index * width, (index + 1) * width)
        groups = slice(block.start // group_size, block.stop // group_size)
        rounder = _Rounder(scaled_gram(gram[index : index + 1], columns[block])[0], group_size, effort)
        if feedback is None:
            for part in _parts(weight[mine], width, mine.start):
                scaled = (weight[part, block] * columns[block]).mul_(rows[part])
                _put(result, part, block, groups, *rounder.round(scaled))
            continue
        error = torch.zeros(weight.shape[0], width, device=weight.device)
        for turn in range(feedback.turns):
            own = feedback.rows(turn)
            target = feedback.wanted_error(turn, error).add_(weight[own, block])
            mine = shares.own(len(own))
            for part in _parts(target[mine], start=mine.start):
                scaled = (target[part] * columns[block]).mul_(rows[own[part]])
                _put(result, own[part], block, groups, *rounder.round(scaled))
            _fill(result, own, block, groups, shares)
            for part in _parts(target):
                there = own[part]
                grid = Grid(result.grid.scale[there, groups], result.grid.zero[there, groups])
                made = dequantize(result.q[there, block], grid).div_(columns[block]).div_(rows[there])
                error[there] = made.sub_(weight[there, block])
    if feedback is None:
        for tensor in (result.q, *result.grid):
            shares.fill(tensor)
    return result


def _fill(result: Rounded, rows: Tensor, columns: slice, groups: slice, shares: RowShares) -> None:
    """Fill in those of some rows that other processes have rounded."""
    if shares.count > 1:
        for tensor, part in ((result.q, columns), (result.grid.scale, groups), (result.grid.zero, groups)):
            some = tensor[rows, part]
            shares.fill(some)
            tensor[rows, part] = some


class _Rounder:
    """Rounds rows of one block of columns. gram: [k, k] of the block's input as the scaled weight gets it."""

    def __init__(self, gram: Tensor, group_size: int, effort: Effort) -> None:
        self._factor = factor_gram(gram)  # which damps by itself
        gram.diagonal().add_(damping_amount(gram, DAMPING))
        self._gram, self._group_size, self._effort = gram, group_size, effort

    def round(self, scaled: Tensor) -> tuple[Tensor, Grid]:
        """Return the integers [n, k] float32 and the grid of scaled weights [n, k]."""
        effort, factor = self._effort, self._factor
        grid = search_range(scaled, factor.residual, self._group_size, effort)
        q = quantize_compensated(scaled, grid, factor)
        if effort.refinements:
            q, grid = refine(q, grid, scaled, self._gram, factor.order, effort.refinements, effort.sweeps)
        return q, grid


def rounding_error(weight: Tensor, columns: Tensor, rows: Tensor, rounded: Rounded, gram: Tensor) -> float:
    """Return the `output_error` of a rounded weight on the unscaled input."""
    total = 0.0
    for part in _parts(weight):
        effective = dequantize(*rounded.rows(part)).div_(columns).div_(rows[part])
        total += output_error(effective.sub_(weight[part]), gram)
    return total


def round_and_compare(
    weight: Tensor,
    columns: Tensor,
    rows: Tensor,
    gram: Tensor,
    group_size: int,
    effort: Effort,
    feedback: OutputFeedback | None = None,
    shares: RowShares = ALONE,
) -> tuple[Rounded, float, float]:
    """Return what `round_compensated` returns, its `rounding_error`, and that of round-to-nearest without scales."""
    rounded = round_compensated(weight, columns, rows, gram, group_size, effort, feedback, shares)
    mine = shares.own(weight.shape[0])
    weight, rows = weight[mine], rows[mine]
    one, ones = torch.ones_like(columns), torch.ones_like(rows)
    nearest = round_nearest(weight, one, ones, group_size)
    with matmul_precision("medium"):  # they are only compared
        error = rounding_error(weight, columns, rows, rounded.rows(mine), gram)
        rtn_error = rounding_error(weight, one, ones, nearest, gram)
    return rounded, shares.total(error), shares.total(rtn_error)


def _empty(weight: Tensor, group_size: int) -> Rounded:
    shape, device = (weight.shape[0], weight.shape[1] // group_size), weight.device
    return Rounded(
        torch.empty(weight.shape, dtype=torch.uint8, device=device),
        Grid(torch.empty(shape, device=device), torch.empty(shape, device=device)),
    )


def part_elements(device: torch.device) -> int:
    """Return how many elements are rounded at a time. It depends on nothing but the kind of device: sums do too."""
    return PART if device.type == "cpu" else GPU_PART


def _parts(weight: Tensor, width: int | None = None, start: int = 0) -> Iterator[slice]:
    """Yield slices of rows whose `width` columns, by default all, have at most `part_elements`.

    start: the number of the first row.
    """
    count, end = max(1, part_elements(weight.device) // (width or weight.shape[1])), start + weight.shape[0]
    return (slice(first, min(first + count, end)) for first in range(start, end, count))


def _put(result: Rounded, rows: slice | Tensor, columns: slice, groups: slice, q: Tensor, grid: Grid) -> None:
    result.q[rows, columns] = q.to(torch.uint8)
    result.grid.scale[rows, groups] = grid.scale
    result.grid.zero[rows, groups] = grid.zero
