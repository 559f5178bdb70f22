"""Lowering the error that compensated rounding leaves: scales are fitted to the integers, and integers to the scales.

Both steps minimize `tr(E H E^T)` itself, so neither can raise it. The best scales of a row have a closed form (least
squares). The integers move one column at a time to their best value while all other columns are fixed, as in Behdin et
al., "QuantEase" (2309.01885).
"""

import torch
from torch import Tensor

from gemma_awq_cli.awq.column_order import columns_as_rows, reordered, rows_as_columns
from gemma_awq_cli.awq.gptq import INNER_COLUMNS, OUTER_COLUMNS
from gemma_awq_cli.awq.grid import QMAX, Grid, dequantize, storable_scale

MAX_CHANGE = 2.0  # a fitted scale may be at most this many times larger or smaller than before


def refine(
    q: Tensor, grid: Grid, weight: Tensor, gram: Tensor, order: Tensor, rounds: int, sweeps: int
) -> tuple[Tensor, Grid]:
    """Improve the integers and scales of one block of columns in `rounds` turns of `sweeps` passes over the columns.

    q: [n, k] float32 integers 0..15 on `grid` [n, k / g]; weight: [n, k] float32, which they approximate; gram: [k, k]
    of the block's input, damped; order: [k], in which the columns move. Returns the new integers and their grid.
    """
    ordered = reordered(gram, order)
    for _ in range(rounds):
        grid = Grid(fit_scales(q, grid, weight, gram), grid.zero)
        q = _move_integers(q, grid, weight, ordered, order, sweeps)
    return q, grid


def fit_scales(q: Tensor, grid: Grid, weight: Tensor, gram: Tensor) -> Tensor:
    """Return the scales [n, G] that minimize the error of the integers [n, k]; a row that cannot gain keeps its own."""
    rows, groups = grid.scale.shape
    steps = (q.unflatten(1, (groups, -1)) - grid.zero[:, :, None]).contiguous()  # [n, G, g]
    normal = torch.empty(rows, groups, groups, device=q.device)
    product = torch.empty_like(q)
    for group, part in enumerate(gram.split(steps.shape[2])):  # symmetric: the part from the diagonal on is enough
        moments = product[:, : q.shape[1] - group * steps.shape[2]]
        torch.mm(steps[:, group], part[:, -moments.shape[1] :], out=moments)
        normal[:, group, group:] = moments.unflatten(1, (groups - group, -1)).mul_(steps[:, group:]).sum(-1)
        normal[:, group:, group] = normal[:, group, group:]
    # solve for the change of the scales, not for the scales: the change would be lost in their rounding
    error = dequantize(q, grid).sub_(weight)
    moment = torch.mm(error, gram, out=product).view_as(steps).mul_(steps).sum(-1)
    ridge = 1e-6 * normal.diagonal(dim1=1, dim2=2).mean(-1) + torch.finfo(torch.float32).tiny  # a group may be all 0
    regular = normal + ridge[:, None, None] * torch.eye(groups, device=q.device)
    fitted = grid.scale - torch.linalg.solve_ex(regular, moment)[0]
    near = (fitted > grid.scale / MAX_CHANGE) & (fitted < grid.scale * MAX_CHANGE)  # false for NaN
    fitted = storable_scale(torch.where(near, fitted, grid.scale))
    change = fitted - grid.scale
    gain = torch.linalg.vecdot((normal @ change[:, :, None])[:, :, 0] + 2 * moment, change)
    return torch.where((gain < 0)[:, None], fitted, grid.scale)


def _move_integers(q: Tensor, grid: Grid, weight: Tensor, gram: Tensor, order: Tensor, sweeps: int) -> Tensor:
    """Coordinate descent on the integers [n, k]. gram: [k, k] with its columns in `order`."""
    group_size = q.shape[1] // grid.scale.shape[1]
    group_of = order // group_size
    scale = grid.scale.t().contiguous()  # [G, n]
    integers = columns_as_rows(q, order)  # [k, n]
    error = columns_as_rows(dequantize(q, grid).sub_(weight), order)  # [k, n]
    curvature = gram.diagonal().contiguous()
    inverse = scale.reciprocal()
    blocks = [slice(start, start + OUTER_COLUMNS) for start in range(0, len(group_of), OUTER_COLUMNS)]
    for block in blocks * sweeps:
        slope = gram[block] @ error  # [OUTER_COLUMNS, n]: half the derivative of the error by each weight
        move_columns(
            slope, integers[block], error[block], gram[block, block], scale, inverse, curvature[block], group_of[block]
        )
    return rows_as_columns(integers, order)


def move_columns_in_torch(
    slope: Tensor,
    integers: Tensor,
    error: Tensor,
    near: Tensor,
    scale: Tensor,
    inverse: Tensor,
    curvature: Tensor,
    group_of: Tensor,
) -> None:
    """Move C columns of n integers one after the other, each to its best value while the others are fixed.

    slope: [C, n], half the derivative of the error by each weight; its contents are lost. integers, error: [C, n],
    which change; near: [C, C] of the Gram matrix, curvature: [C], its diagonal; scale, inverse: [G, n], and one by the
    other; group_of: [C], the group of each column.
    """
    groups, bends = group_of.tolist(), curvature.tolist()
    for first in range(0, len(groups), INNER_COLUMNS):
        part = slope[first : first + INNER_COLUMNS]
        moves = torch.zeros_like(part)
        for i in range(part.shape[0]):
            column, group = first + i, groups[first + i]
            if bends[column] <= 0:
                continue
            before, move = integers[column], moves[i]
            best = torch.addcmul(before, part[i], inverse[group], value=-1 / bends[column])
            torch.sub(best.round_().clamp_(0, QMAX), before, out=move)
            before.copy_(best)
            move.mul_(scale[group])
            part[i + 1 :].addr_(near[column + 1 : first + part.shape[0], column], move)
        last = first + INNER_COLUMNS
        error[first:last] += moves
        slope[last:].addmm_(near[last:, first:last], moves)


# See `gptq.round_columns`.
move_columns = torch.library.custom_op(
    "gemma_awq::move_columns", move_columns_in_torch, mutates_args=("slope", "integers", "error")
)
