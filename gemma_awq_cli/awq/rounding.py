"""Rounding with error compensation on a fixed grid: what one column loses, the columns after it make up for.

Source: Frantar et al., "GPTQ" (2210.17323), with static groups, so that the order of the columns is free (largest
diagonal of H first) while the stored layout stays the plain one. Computed in the form that Chee et al., "QuIP"
(2307.13304) proved equal: with `H = R R^T`, R upper triangular, `tr(E H E^T) = ||E R||^2`, and column j of `E R` is
`e_j R_jj` plus what the columns before it left. One factorization, no inverse.
"""

import torch
from torch import Tensor

from gemma_awq_cli.awq.grid import QMAX, Grid
from gemma_awq_cli.awq.precision import widest_float

# Share of the mean diagonal added to H. GPTQ's 0.01 fits the calibration rows closer but held-out text of other kinds
# worse: KL 0.113 against 0.107 on Gemma 3 270M with 32 rows.
DAMPING = 0.05
COLUMNS = 64  # columns rounded between two products with all that came before
ROWS = 4096  # rows of a weight rounded at a time: they are independent


def compensated(weight: Tensor, grid: Grid, gram: Tensor, damping: float = DAMPING) -> Tensor:
    """weight [N, K] float32 -> integers 0..15 as float32 [N, K] on `grid`; gram: [B, k, k] of the same input."""
    width = gram.shape[1]
    group_size = weight.shape[1] // grid.scale.shape[1]
    result = torch.empty_like(weight)
    for index, block in enumerate(gram):
        columns = slice(index * width, (index + 1) * width)
        groups = slice(columns.start // group_size, columns.stop // group_size)
        order = torch.argsort(block.diagonal(), descending=True, stable=True)
        feedback = error_feedback(block, order, damping)
        for start in range(0, weight.shape[0], ROWS):
            rows = slice(start, start + ROWS)
            own = Grid(grid.scale[rows, groups], grid.zero[rows, groups])
            result[rows, columns] = _round_columns(weight[rows, columns], own, order, feedback)
    return result


def error_feedback(gram: Tensor, order: Tensor, damping: float) -> Tensor:
    """What an error of column i asks of column j > i: `R_ij / R_jj` of the damped H in `order`. [k, k] upper.

    The damping grows until the factor exists.
    """
    device = gram.device
    # The other way round, the lower factor that libraries give is the upper one that is wanted.
    reverse = order.flip(0)
    if widest_float(device) != torch.float64:
        gram, reverse = gram.cpu(), reverse.cpu()  # a factorization in float32 would need more damping
    while True:
        damped = gram[reverse][:, reverse].to(torch.float64)
        diagonal = damped.diagonal()
        diagonal.add_(damping * diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            del damped, diagonal
            lower /= lower.diagonal().clone()
            return lower.to(torch.float32).flip(0, 1).to(device)
        damping *= 10


def _round_columns(weight: Tensor, grid: Grid, order: Tensor, feedback: Tensor) -> Tensor:
    """One block of columns [n, k], walked in `order`."""
    group_size = weight.shape[1] // grid.scale.shape[1]
    # Columns become contiguous rows: the loop below walks them one at a time.
    work = weight[:, order].t().contiguous()  # [k, n]: what a column should be, then what was lost
    scale = grid.scale.t().contiguous()  # [G, n]
    zero = grid.zero.t().contiguous()
    group_of = (order // group_size).tolist()
    q = torch.empty_like(work)
    for start in range(0, work.shape[0], COLUMNS):
        part = work[start : start + COLUMNS]
        wanted = part.clone()
        if start:
            wanted.addmm_(feedback[:start, start : start + COLUMNS].t(), work[:start], alpha=-1.0)
        for i in range(part.shape[0]):
            column, group = start + i, group_of[start + i]
            torch.div(wanted[i], scale[group], out=q[column]).add_(zero[group]).round_().clamp_(0, QMAX)
            # the column's place now holds its error, q - w
            error = torch.sub(q[column], zero[group]).mul_(scale[group]).sub_(part[i])
            part[i] = error
            wanted[i + 1 :].addr_(feedback[column, column + 1 : start + part.shape[0]], error, alpha=-1.0)
    result = torch.empty_like(weight)
    result[:, order] = q.t()
    return result
