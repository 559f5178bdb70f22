"""An int4 product that reads the file's own tensors, for GPUs that Triton has a compiler for.

Few rows are multiplied by the packed weight; for many it is unpacked once, in one pass, and multiplied by cuBLAS. Both
are operations of torch's own dispatcher, so that a recorded step may hold them; on the CPU they are computed in plain
torch, which is what the kernels are tested against. This project has never run them on a GPU: they are right in
Triton's interpreter, and a GPU must first multiply known numbers rightly.
"""

import importlib.util
from functools import cache

import torch
from torch import Tensor

from gemma_awq_cli.awq.grid import dequantize
from gemma_awq_cli.awq.packed_arrays import PACK
from gemma_awq_cli.awq.packing import PackedWeight, unpack_weight
from gemma_awq_cli.kernels.known_numbers import problem_with
from gemma_awq_cli.kernels.reference import ReferenceLinear

FEW_ROWS = 8
_GROUP_SIZES = (32, 64, 128)
_DTYPES = (torch.bfloat16, torch.float16)


@torch.library.custom_op("gemma_awq::few_rows_product", mutates_args=())
def few_rows_product(x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """x [R, K] of at most `FEW_ROWS` rows times the weight [K, N] of the file's tensors: [R, N] in the dtype of x."""
    weight = dequantize(*unpack_weight(PackedWeight(qweight, qzeros, scales)))
    return (x.to(torch.float32) @ weight.t()).to(x.dtype)


@few_rows_product.register_kernel("cuda")
def _(x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    from gemma_awq_cli.kernels import triton_products

    with torch.cuda.device(x.device):
        return triton_products.few_rows_product(x, PackedWeight(qweight, qzeros, scales))


@torch.library.custom_op("gemma_awq::unpacked", mutates_args=())
def unpacked(qweight: Tensor, qzeros: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight [K, N] of the file's tensors."""
    return dequantize(*unpack_weight(PackedWeight(qweight, qzeros, scales))).to(dtype).t().contiguous()


@unpacked.register_kernel("cuda")
def _(qweight: Tensor, qzeros: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    from gemma_awq_cli.kernels import triton_products

    with torch.cuda.device(qweight.device):
        return triton_products.unpacked(PackedWeight(qweight, qzeros, scales), dtype)


class FileInt4Linear(ReferenceLinear):
    """A linear that holds the tensors of the file."""

    @staticmethod
    def refusal(weight: PackedWeight, device: torch.device, dtype: torch.dtype) -> str | None:
        """See `PackedLinear.refusal`."""
        if device.type != "cuda":
            return "it needs an NVIDIA or AMD GPU"
        if dtype not in _DTYPES:
            return "it computes in 16 bits only"
        if dtype == torch.bfloat16 and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] < 8:
            return "it needs compute capability 8.0 or later in bfloat16"
        if weight.qweight.shape[0] // weight.scales.shape[0] not in _GROUP_SIZES:
            return f"groups of {weight.qweight.shape[0] // weight.scales.shape[0]} are not supported"
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        return _problem(device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        if rows.shape[0] <= FEW_ROWS:
            result = few_rows_product(rows, self.qweight, self.qzeros, self.scales)
        else:
            result = rows @ unpacked(self.qweight, self.qzeros, self.scales, x.dtype)
        return result.view(*x.shape[:-1], -1)


@cache
def _problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels are not to be used on a device, or None."""
    return problem_with(FileInt4Linear, device, dtype, (9 * PACK, 256), (1, FEW_ROWS, FEW_ROWS + 1))
