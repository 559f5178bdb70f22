"""Sums whose order of additions is the same in every run, on GPUs too.

There `index_add_`, `scatter_add_` and `cumsum` add in whatever order the device's threads arrive, and float32 sums
depend on it. On the CPU those operations have a fixed order and are the fastest form, so they stay.
"""

import torch
from torch import Tensor


def sum_by_class(values: Tensor, classes: Tensor, count: int) -> Tensor:
    """Return the sums of `values` [K] over the members of each of `count` classes: [count].

    classes: [K] integers 0 .. count - 1, each of them equally often.
    """
    members = torch.argsort(classes, stable=True).view(count, -1)
    total = torch.zeros(count, dtype=values.dtype, device=values.device)
    for member in members.t():
        total += values[member]
    return total


def add_by_place(total: Tensor, places: Tensor, values: Tensor) -> None:
    """Add each value [N, G] to one of the g columns of its group in `total` [G, g], in place.

    places: [N, G] int64, the columns.
    """
    if total.device.type == "cpu":
        total.scatter_add_(1, places.t(), values.t())
        return
    spread = torch.zeros((places.shape[0], *total.shape), dtype=total.dtype, device=total.device)
    total += spread.scatter_(2, places[:, :, None], values[:, :, None]).sum(0)


def running_sums(values: Tensor) -> Tensor:
    """Return the sums of each row [R, C] up to and with each column: [R, C]."""
    if values.device.type == "cpu":
        return values.cumsum(1)
    sums, shift = values.clone(), 1
    while shift < sums.shape[1]:  # each sum takes in the one that ends where it begins
        sums = torch.cat([sums[:, :shift], sums[:, shift:] + sums[:, :-shift]], dim=1)
        shift *= 2
    return sums
