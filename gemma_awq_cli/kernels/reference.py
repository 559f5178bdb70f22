"""The reference: unpack, dequantize in float32, round to the input's dtype, multiply. Right everywhere, always slow."""

import torch
from torch import Tensor, nn

from gemma_awq_cli.awq.grid import dequantize
from gemma_awq_cli.awq.packing import PackedWeight, unpack_weight
from gemma_awq_cli.kernels.dense_products import linear


class ReferenceLinear(nn.Module):
    """A linear that holds the tensors of the file; its dense weight exists only while it is used."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor

    @staticmethod
    def refusal(weight: PackedWeight, device: torch.device, dtype: torch.dtype) -> str | None:
        """None: the reference takes everything."""
        return None

    def __init__(self, packed: PackedWeight) -> None:
        super().__init__()
        for name, tensor in packed._asdict().items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, grid = unpack_weight(PackedWeight(self.qweight, self.qzeros, self.scales))
        return linear(x, dequantize(q, grid).to(x.dtype))
