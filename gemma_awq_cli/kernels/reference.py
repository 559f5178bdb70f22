"""The oracle: unpack, dequantize in float32, round to the input's dtype, multiply. Right everywhere, fast nowhere."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemma_awq_cli.awq.grid import dequantize
from gemma_awq_cli.awq.packing import PackedWeight, unpack_weight


class ReferenceLinear(nn.Module):
    """Holds the file's own tensors; one dense weight exists only while it is used."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor

    @staticmethod
    def refusal(weight: PackedWeight, device: torch.device, dtype: torch.dtype) -> str | None:
        """None: it takes everything."""
        return None

    def __init__(self, packed: PackedWeight) -> None:
        super().__init__()
        for name, tensor in packed._asdict().items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, grid = unpack_weight(PackedWeight(self.qweight, self.qzeros, self.scales))
        return F.linear(x, dequantize(q, grid).to(x.dtype))
