"""The 4-bit grid of the AutoAWQ layout: `w = (q - zero) * scale` with q and zero in 0..15, one pair per group of a row.

Shapes: a weight is [N, K] (out, in), its groups are [N, G, g] with G = K / g.
"""

from typing import NamedTuple

import torch
from torch import Tensor

QMAX = 15
# The smallest scale that float16 (subnormals included) and bfloat16 both hold with 8 significant bits.
MIN_SCALE = 2.0**-17
MAX_SCALE = 65280.0


class Grid(NamedTuple):
    """One scale and one zero point per group.

    scale: [N, G] float32, each value exact in both float16 and bfloat16; zero: [N, G] float32, integers 0..15.
    """

    scale: Tensor
    zero: Tensor


def storable_scale(scale: Tensor) -> Tensor:
    """Round float32 scales to the nearest ones that float16 and bfloat16 both hold exactly (8 significant bits)."""
    return scale.clamp(MIN_SCALE, MAX_SCALE).to(torch.bfloat16).to(torch.float32)


def grid_of_range(low: Tensor, high: Tensor) -> Grid:
    """Return the grid that spans [low, high] ([N, G] each), widened to contain 0 so that the zero point fits 0..15."""
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scale = storable_scale((high - low) / QMAX)
    zero = torch.round(-low / scale).clamp_(0, QMAX)
    return Grid(scale, zero)


def minmax_grid(weight: Tensor, group_size: int) -> Grid:
    """Return the grid of plain round-to-nearest: each group's own range. weight: [N, K] float32."""
    groups = weight.unflatten(1, (-1, group_size))
    return grid_of_range(groups.amin(-1), groups.amax(-1))


def quantize(weight: Tensor, grid: Grid) -> Tensor:
    """Round a weight [N, K] float32 to nearest on `grid`. Returns integers 0..15 as float32 [N, K]."""
    group_size = weight.shape[1] // grid.scale.shape[1]
    groups = weight.unflatten(1, (-1, group_size))
    q = torch.div(groups, grid.scale[:, :, None]).add_(grid.zero[:, :, None]).round_().clamp_(0, QMAX)
    return q.flatten(1)


def dequantize(q: Tensor, grid: Grid) -> Tensor:
    """Return the float32 weight [N, K] that integers [N, K] on `grid` stand for."""
    group_size = q.shape[1] // grid.scale.shape[1]
    groups = q.unflatten(1, (-1, group_size)).to(torch.float32)
    return (groups - grid.zero[:, :, None]).mul_(grid.scale[:, :, None]).flatten(1)


def nearest(weight: Tensor, grid: Grid) -> Tensor:
    """Return a weight [N, K] float32 after rounding to nearest on `grid`, as float32."""
    return dequantize(quantize(weight, grid), grid)
