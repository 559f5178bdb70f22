"""PyTorch's own int4 product for CPUs, in bfloat16 (its float16 and float32 variants are about 60 times slower).

For few rows the op reads the packed weights; for many it is faster to unpack the weight once and multiply in bf16. The
op's packed layout depends on the processor, so it is determined by packing a known matrix.
"""

from functools import cache

import torch
from torch import Tensor, nn

from gemma_awq_cli.awq.packing import PackedWeight, unpack_columns, unpack_weight
from gemma_awq_cli.kernels.aten_int4 import scale_zero, shape_refusal
from gemma_awq_cli.kernels.dense_products import linear

MANY_ROWS = 256
_OUTPUT_MULTIPLE = 16  # the number of outputs must be a multiple of this


class CpuInt4Linear(nn.Module):
    """packed: uint8 [N, K/2] in the op's layout; scale_zero: bf16 [K/g, N, 2], w = (q - 8) * scale + zero."""

    packed: Tensor
    scale_zero: Tensor
    offset: Tensor

    @staticmethod
    def refusal(weight: PackedWeight, device: torch.device, dtype: torch.dtype) -> str | None:
        """See `PackedLinear.refusal`."""
        if device.type != "cpu" or dtype != torch.bfloat16:
            return "it computes in bfloat16 on the CPU only"
        return shape_refusal(weight, (_OUTPUT_MULTIPLE, 1))

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        q, grid = unpack_weight(weight)
        self.group_size = q.shape[1] // grid.scale.shape[1]
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.to(torch.int32), 1)
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("scale_zero", scale_zero(grid), persistent=False)
        # the zero points themselves: the exact dense weight needs them
        self.register_buffer("offset", unpack_columns(weight.qzeros), persistent=False)
        self.block = _layout_block() if q.shape[0] % (_layout_block() or 1) == 0 else None

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if rows.shape[0] >= MANY_ROWS and self.block is not None:
            return linear(x, self.dense())
        result = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows.to(torch.bfloat16), self.packed, self.group_size, self.scale_zero
        )
        return result.view(*x.shape[:-1], -1).to(x.dtype)

    def dense(self) -> Tensor:
        """Return the weight [N, K] in bf16: (q - z) * scale, rounded once."""
        assert self.block is not None
        outputs, inputs = self.packed.shape[0], self.packed.shape[1] * 2
        q = _unpack_blocks(self.packed, self.block)  # [N, K] uint8
        groups = q.view(outputs, -1, self.group_size).to(torch.bfloat16)
        groups.sub_(self.offset.t().to(torch.bfloat16)[:, :, None])
        return groups.mul_(self.scale_zero[:, :, 0].t()[:, :, None]).view(outputs, inputs)


def _unpack_blocks(packed: Tensor, block: int) -> Tensor:
    """The op's layout -> uint8 [N, K]. In a block of rows, byte d of each column holds rows d (low) and d + block/2."""
    outputs, inputs = packed.shape[0], packed.shape[1] * 2
    bytes_ = packed.view(-1, inputs, block // 2)  # [N/block, K, block/2]
    both = torch.stack([bytes_ & 15, bytes_ >> 4], dim=1)  # [N/block, 2, K, block/2]
    return both.transpose(2, 3).reshape(outputs, inputs)


@cache
def _layout_block() -> int | None:
    """How many rows the op packs together on this processor; None if it has an unknown layout."""
    known = torch.randint(0, 16, (128, 64), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(known, 1)
    for block in (64, 32, 16):
        if torch.equal(_unpack_blocks(packed, block).to(torch.int32), known):
            return block
    return None
