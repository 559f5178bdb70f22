"""Linear layers whose weights stay packed in 4 bits, behind one choice.

A kernel is an `nn.Module` made from the tensors of the file; its forward takes [..., K] and gives [..., N] in the dtype
of its input. `reference.py` is the oracle that every other kernel is tested against, and the fallback everywhere.
"""

import torch
from torch import nn

from gemma_awq_cli.awq.pack import PackedWeight
from gemma_awq_cli.kernels.cpu import CpuInt4Linear
from gemma_awq_cli.kernels.reference import ReferenceLinear


def make_linear(packed: PackedWeight, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The fastest kernel for these tensors on this device in this dtype."""
    if CpuInt4Linear.refusal(packed, device, dtype) is None:
        return CpuInt4Linear(packed)
    return ReferenceLinear(packed).to(device)
