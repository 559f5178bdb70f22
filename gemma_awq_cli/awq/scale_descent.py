"""A scale a channel by gradient descent on what rounding with it is expected to cost.

An error of rounding is even over a step, and a step is a 15th of its group's range: with s the scale and R_jj^2 a
column's residual (see rounding.py), what is expected to stay of a linear's error is, but for a constant,

    sum over groups g of  (sum over rows n of range_ng(s)^2)  x  (sum over columns j in g of R_jj^2 / s_j^2)

A larger s_j makes the column's own error smaller, until its weights are the ones that stretch the groups' ranges.
AWQ's exponents find the best scale of a family of two parameters; this has one a channel.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

RATE = 0.03  # of log s, a step, falling to 0


def descend(
    weights: Sequence[Tensor],
    shares: Sequence[float],
    residual: Tensor,
    start: Tensor,
    shared: Tensor | None,
    group_size: int,
    steps: int,
) -> Tensor:
    """The scale [K] float32 that `steps` of Adam find from `start` [K].

    weights: [N_i, K] float32 of the linears that share the input, shares: how much a row of each counts; residual: [K];
    shared: [K] integers, equal where columns must get the same scale.
    """
    owner = torch.arange(start.numel(), device=start.device) if shared is None else shared
    count = int(owner.max()) + 1
    members = torch.zeros(count, device=start.device).index_add_(0, owner, torch.ones_like(start))
    logs = torch.zeros(count, device=start.device).index_add_(0, owner, start.log()) / members
    optimizer = torch.optim.Adam([logs], lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        slope = _slope(weights, shares, residual, logs.exp()[owner], group_size)
        logs.grad = torch.zeros_like(logs).index_add_(0, owner, slope)
        optimizer.step()
        schedule.step()
    return logs.exp()[owner]


def _slope(
    weights: Sequence[Tensor], shares: Sequence[float], residual: Tensor, scale: Tensor, group_size: int
) -> Tensor:
    """The derivative of the log of the expected cost by log s: [K]."""
    groups = scale.numel() // group_size
    own = (residual / scale.square()).view(groups, group_size)
    left = own.sum(1)  # [G]
    spread = torch.zeros(groups, device=scale.device)
    stretch = torch.zeros(groups, group_size, device=scale.device)  # half of d spread / d log s
    for weight, share in zip(weights, shares, strict=True):
        scaled = (weight * scale).unflatten(1, (groups, group_size))
        high, highest = scaled.max(-1)  # [N, G]
        low, lowest = scaled.min(-1)
        high, low = high.clamp_(min=0), low.clamp_(max=0)  # a grid holds 0
        width = share * (high - low)
        spread += (width * (high - low)).sum(0)
        stretch.scatter_add_(1, highest.t(), (width * high).t())
        stretch.scatter_add_(1, lowest.t(), -(width * low).t())
    cost = (spread * left).sum()
    return (2 * (stretch * left[:, None] - spread[:, None] * own) / cost).flatten()
