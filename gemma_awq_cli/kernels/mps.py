"""PyTorch's own int4 product for Apple's GPUs, in bfloat16: the same operations as CUDA's, for any number of rows.

This project has never run it on a Mac: it is tested on a simulated device. So a GPU must first multiply known numbers
rightly.
"""

from functools import cache

import torch
from torch import Tensor, nn

from gemma_awq_cli.awq.packing import PackedWeight, unpack_weight
from gemma_awq_cli.kernels.aten_int4 import TILE, pack_tiles, scale_zero, shape_refusal
from gemma_awq_cli.kernels.known_numbers import problem_with


class MpsInt4Linear(nn.Module):
    """packed: int32 in the op's layout; scale_zero: bf16 [K/g, N, 2], w = (q - 8) * scale + zero."""

    packed: Tensor
    scale_zero: Tensor

    @staticmethod
    def refusal(weight: PackedWeight, device: torch.device, dtype: torch.dtype) -> str | None:
        """See `PackedLinear.refusal`."""
        if device.type != "mps":
            return "it needs an Apple GPU"
        if dtype != torch.bfloat16:
            return "it computes in bfloat16 only"
        return shape_refusal(weight, TILE) or _problem(device)

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        q, grid = unpack_weight(weight)
        self.group_size = q.shape[1] // grid.scale.shape[1]
        self.register_buffer("packed", pack_tiles(q), persistent=False)
        self.register_buffer("scale_zero", scale_zero(grid), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        result = torch.ops.aten._weight_int4pack_mm(rows, self.packed, self.group_size, self.scale_zero)
        return result.view(*x.shape[:-1], -1)


@cache
def _problem(device: torch.device) -> str | None:
    """Why the op is not to be used on a device, or None: it is tried on known numbers there, for few rows and many."""
    return problem_with(MpsInt4Linear, device, torch.bfloat16, (4 * TILE[0], 2 * TILE[1]), (1, 17, 64))
