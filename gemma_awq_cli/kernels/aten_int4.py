"""What PyTorch's int4 products share: `w = (q - 8) * scale + zero` in bfloat16, and the packing of those for GPUs."""

import torch
from torch import Tensor

from gemma_awq_cli.awq.grid import Grid
from gemma_awq_cli.awq.packing import PackedWeight

GROUP_SIZES = (32, 64, 128, 256)
_INNER_TILES = 8
TILE = (8, 16 * _INNER_TILES)  # outputs and inputs that the ops for GPUs pack together


def shape_refusal(weight: PackedWeight, tile: tuple[int, int]) -> str | None:
    """Why an op that packs tiles of so many outputs and inputs does not take a weight's shape, or None."""
    inputs, outputs = weight.qweight.shape[0], weight.scales.shape[1]
    group = inputs // weight.scales.shape[0]
    if outputs % tile[0] or inputs % tile[1] or group not in GROUP_SIZES:
        return f"{outputs} outputs in groups of {group} do not fit its tiles"
    return None


def scale_zero(grid: Grid) -> Tensor:
    """Return the scales and zeros as the ops read them: a grid of [N, G] -> bf16 [G, N, 2]."""
    scale, zero = grid.scale.t(), grid.zero.t()
    return torch.stack([scale, (8 - zero) * scale], dim=-1).to(torch.bfloat16).contiguous()


def pack_tiles(q: Tensor) -> Tensor:
    """q [N, K] uint8 -> the layout of the ops for GPUs, which take two inputs per byte, the first in the high half."""
    return torch.ops.aten._convert_weight_to_int4pack((q[:, ::2] << 4 | q[:, 1::2]).contiguous(), _INNER_TILES)
