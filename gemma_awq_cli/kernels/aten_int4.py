"""What PyTorch's int4 products for CPUs and for NVIDIA GPUs share: `w = (q - 8) * scale + zero` in bfloat16."""

import torch
from torch import Tensor

from gemma_awq_cli.awq.grid import Grid

GROUP_SIZES = (32, 64, 128, 256)


def scale_zero(grid: Grid) -> Tensor:
    """Return the scales and zeros as the ops read them: a grid of [N, G] -> bf16 [G, N, 2]."""
    scale, zero = grid.scale.t(), grid.zero.t()
    return torch.stack([scale, (8 - zero) * scale], dim=-1).to(torch.bfloat16).contiguous()
