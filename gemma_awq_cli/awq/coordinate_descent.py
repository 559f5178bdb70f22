"""Lowering what compensated rounding left: scales fitted to the integers, then integers to the scales, in turns.

Both lower `tr(E H E^T)` itself and so never lose. The scales of a row have a closed form (least squares); the integers
are moved one column at a time to the best value while all others stand still, as in Behdin et al., "QuantEase"
(2309.01885).
"""

import torch
from torch import Tensor

from gemma_awq_cli.awq.gptq import COLUMNS, WIDE
from gemma_awq_cli.awq.grid import QMAX, Grid, dequantize, storable_scale

FARTHEST = 2.0  # a fitted scale may be this many times larger or smaller than before


def refined(
    q: Tensor, grid: Grid, weight: Tensor, gram: Tensor, order: Tensor, rounds: int, sweeps: int
) -> tuple[Tensor, Grid]:
    """Improve integers and scales of one block of columns by `rounds` turns, with `sweeps` over the columns in each.

    q: [n, k] float32 integers 0..15 on `grid` ([n, k / g]); weight: [n, k] float32, what they stand for; gram: [k, k]
    of the block's input, damped; order: [k], in which the columns are moved. Returns the new integers and grid.
    """
    ordered = gram[order][:, order]
    for _ in range(rounds):
        grid = Grid(fitted_scales(q, grid, weight, gram), grid.zero)
        q = _moved(q, grid, weight, ordered, order, sweeps)
    return q, grid


def fitted_scales(q: Tensor, grid: Grid, weight: Tensor, gram: Tensor) -> Tensor:
    """The scales [n, G] under which the integers [n, k] cost least; a row that would not gain keeps its own."""
    rows, groups = grid.scale.shape
    steps = (q.unflatten(1, (groups, -1)) - grid.zero[:, :, None]).contiguous()  # [n, G, g]
    normal = torch.empty(rows, groups, groups, device=q.device)
    product = torch.empty_like(q)
    for group, part in enumerate(gram.split(steps.shape[2])):  # symmetric: from the diagonal on is enough
        moments = product[:, : q.shape[1] - group * steps.shape[2]]
        torch.mm(steps[:, group], part[:, -moments.shape[1] :], out=moments)
        normal[:, group, group:] = moments.unflatten(1, (groups - group, -1)).mul_(steps[:, group:]).sum(-1)
        normal[:, group:, group] = normal[:, group, group:]
    # by how much a scale should change, from the error that is left: its own size would drown it
    error = dequantize(q, grid).sub_(weight)
    moment = torch.mm(error, gram, out=product).view_as(steps).mul_(steps).sum(-1)
    ridge = 1e-6 * normal.diagonal(dim1=1, dim2=2).mean(-1) + torch.finfo(torch.float32).tiny  # a group may be all 0
    regular = normal + ridge[:, None, None] * torch.eye(groups, device=q.device)
    fitted = grid.scale - torch.linalg.solve_ex(regular, moment)[0]
    near = (fitted > grid.scale / FARTHEST) & (fitted < grid.scale * FARTHEST)  # false for NaN
    fitted = storable_scale(torch.where(near, fitted, grid.scale))
    change = fitted - grid.scale
    gain = torch.linalg.vecdot((normal @ change[:, :, None])[:, :, 0] + 2 * moment, change)
    return torch.where((gain < 0)[:, None], fitted, grid.scale)


def _moved(q: Tensor, grid: Grid, weight: Tensor, gram: Tensor, order: Tensor, sweeps: int) -> Tensor:
    """Coordinate descent on the integers [n, k]; gram: in `order`."""
    group_size = q.shape[1] // grid.scale.shape[1]
    group_of = (order // group_size).tolist()
    scale = grid.scale.t().contiguous()  # [G, n]
    integers = q[:, order].t().contiguous()  # [k, n]
    error = dequantize(q, grid).sub_(weight)[:, order].t().contiguous()  # [k, n]
    curvature = gram.diagonal().tolist()
    inverse = scale.reciprocal()
    outer = [slice(start, start + WIDE) for start in range(0, len(group_of), WIDE)]
    for own in outer * sweeps:
        slope = gram[own] @ error  # [WIDE, n]: half the cost's derivative by each weight
        near = gram[own, own]
        for first in range(0, slope.shape[0], COLUMNS):
            part = slope[first : first + COLUMNS]
            moves = torch.zeros_like(part)
            for i in range(part.shape[0]):
                column = own.start + first + i
                group = group_of[column]
                if curvature[column] <= 0:
                    continue
                before, move = integers[column], moves[i]
                best = torch.addcmul(before, part[i], inverse[group], value=-1 / curvature[column])
                torch.sub(best.round_().clamp_(0, QMAX), before, out=move)
                before.copy_(best)
                move.mul_(scale[group])
                part[i + 1 :].addr_(near[first + i + 1 : first + part.shape[0], first + i], move)
            error[own][first : first + COLUMNS] += moves
            slope[first + COLUMNS :].addmm_(near[first + COLUMNS :, first : first + COLUMNS], moves)
    result = torch.empty_like(q)
    result[:, order] = integers.t()
    return result
