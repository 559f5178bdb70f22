"""Gradient descent on one scale per channel, to minimize the expected error of rounding with it.

A rounding error is uniform over one step of the grid, and a step is a 15th of its group's range. With s the scale and
R_jj^2 a column's residual (see gptq.py), the error of a linear that is expected to remain is, up to a constant,

    sum over groups g of  (sum over rows n of range_ng(s)^2)  x  (sum over columns j in g of R_jj^2 / s_j^2)

Linears with inputs of their own may share a scale, as the experts of a layer do: their errors add up.

A larger s_j makes the error of column j smaller, until its weights are those that stretch the ranges of the groups.
AWQ's exponents search a family of scales with two parameters; this has one parameter per channel.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gemma_awq_cli.awq.ordered_sums import add_by_place, sum_by_class

LEARNING_RATE = 0.03  # of log s; it falls to 0 over the steps


class Fed(NamedTuple):
    """Linears with one input.

    weights: [N_i, K] float32; residual: [K] of the input, see `Compensation`; shares: how much a row of each weight
    counts.
    """

    weights: Sequence[Tensor]
    residual: Tensor
    shares: Sequence[float]


def descend(
    parts: Sequence[Fed],
    start: Tensor,
    tied: Tensor | None,
    group_size: int,
    steps: int,
) -> Tensor:
    """Return the scale [K] float32 that `steps` of Adam find from `start` [K].

    parts: the linears that get it; tied: [K] integers from 0 on, equal for columns that must get the same scale, each
    equally often, or None if there are none.
    """
    parameter = torch.arange(start.numel(), device=start.device) if tied is None else tied  # of each column
    count = int(parameter.max()) + 1
    logs = sum_by_class(start.log(), parameter, count) / (start.numel() // count)
    optimizer = torch.optim.Adam([logs], lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        slope = _slope(parts, logs.exp()[parameter], group_size)
        logs.grad = sum_by_class(slope, parameter, count)
        optimizer.step()
        schedule.step()
    return logs.exp()[parameter]


def _slope(parts: Sequence[Fed], scale: Tensor, group_size: int) -> Tensor:
    """Return the derivative of the log of the expected error by log s: [K]."""
    groups = scale.numel() // group_size
    total = torch.zeros((), device=scale.device)
    slope = torch.zeros(groups, group_size, device=scale.device)
    for part in parts:
        column_cost = (part.residual / scale.square()).view(groups, group_size)
        group_cost = column_cost.sum(1)  # [G]
        spread = torch.zeros(groups, device=scale.device)
        stretch = torch.zeros(groups, group_size, device=scale.device)  # half of d spread / d log s
        for weight, share in zip(part.weights, part.shares, strict=True):
            add_stretch(weight, scale, share, spread, stretch)
        total += (spread * group_cost).sum()
        slope += stretch * group_cost[:, None] - spread[:, None] * column_cost
    return (2 * slope / total).flatten()


def add_stretch_in_torch(weight: Tensor, scale: Tensor, share: float, spread: Tensor, stretch: Tensor) -> None:
    """Add the squared ranges of a weight's groups, and half their derivative by the log of each column's scale.

    weight: [N, K] float32, scale: [K]; share: how much a row counts; spread: [G] and stretch: [G, g], the sums.
    """
    scaled = (weight * scale).unflatten(1, stretch.shape)
    high, highest = scaled.max(-1)  # [N, G]
    low, lowest = scaled.min(-1)
    high, low = high.clamp_(min=0), low.clamp_(max=0)  # every grid contains 0
    width = share * (high - low)
    spread += (width * (high - low)).sum(0)
    add_by_place(stretch, highest, width * high)
    add_by_place(stretch, lowest, -(width * low))


# See `gptq.round_columns`.
add_stretch = torch.library.custom_op(
    "gemma_awq::add_stretch", add_stretch_in_torch, mutates_args=("spread", "stretch")
)
