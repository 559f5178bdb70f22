"""AutoAWQ's Triton product: the portable kernel for GPUs (CUDA, ROCm, XPU), in float16.

It reads the file's tensors as they are. This project has never run it: no GPU was available.
"""

import torch
from torch import Tensor

from gemma_awq_cli.awq.packing import PackedWeight
from gemma_awq_cli.kernels.autoawq import triton_gemm
from gemma_awq_cli.kernels.reference import ReferenceLinear

MANY_ROWS = 32  # from here on the buffer of the partial sums [_SPLIT_K, rows, N] costs more than unpacking once
_SPLIT_K = 8
_GROUP_SIZES = (32, 64, 128)


class TritonLinear(ReferenceLinear):
    """A linear that holds the tensors of the file on a GPU; many rows go through the reference."""

    @staticmethod
    def refusal(weight: PackedWeight, device: torch.device, dtype: torch.dtype) -> str | None:
        """See `PackedLinear.refusal`."""
        if device.type not in ("cuda", "xpu"):
            return "it needs a GPU (CUDA, ROCm or XPU)"
        if dtype != torch.float16:
            return "it computes in float16 only"
        if weight.qweight.shape[0] // weight.scales.shape[0] not in _GROUP_SIZES:
            return f"groups of {weight.qweight.shape[0] // weight.scales.shape[0]} are not supported"
        if triton_gemm() is None:
            return "AutoAWQ or triton is not installed"
        return None

    def forward(self, x: Tensor) -> Tensor:
        gemm = triton_gemm()
        rows = x.reshape(-1, x.shape[-1])
        if gemm is None or rows.shape[0] >= MANY_ROWS:
            return super().forward(x)
        result: Tensor = gemm(rows, self.qweight, self.scales, self.qzeros, _SPLIT_K)
        return result.view(*x.shape[:-1], -1)
