"""Linear layers whose weights stay packed in 4 bits, behind one choice.

A kernel is an `nn.Module` made from the tensors of the file; its forward takes [..., K] and gives [..., N] in the dtype
of its input. `reference.py` is the oracle that every other kernel is tested against, and the fallback everywhere. The
compiled kernels under `native/` have an interface of their own, because they run a whole model in one call.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from gemma_awq_cli.awq.pack import PackedWeight
from gemma_awq_cli.kernels.cpu import CpuInt4Linear
from gemma_awq_cli.kernels.cuda import CudaInt4Linear
from gemma_awq_cli.kernels.reference import ReferenceLinear
from gemma_awq_cli.kernels.triton import TritonLinear


@dataclass(frozen=True)
class Kernel:
    """refusal: why it cannot take these tensors on this device in this dtype, or None."""

    name: str
    refusal: Callable[[PackedWeight, torch.device, torch.dtype], str | None]
    make: Callable[[PackedWeight], nn.Module]


# Best first.
KERNELS = (
    Kernel("PyTorch's int4 product for CPUs", CpuInt4Linear.refusal, CpuInt4Linear),
    Kernel("PyTorch's int4 product for CUDA", CudaInt4Linear.refusal, CudaInt4Linear),
    Kernel("AutoAWQ's Triton product", TritonLinear.refusal, TritonLinear),
    Kernel("unpack and multiply", lambda *_: None, ReferenceLinear),
)


def choose(packed: PackedWeight, device: torch.device, dtype: torch.dtype) -> tuple[Kernel, list[str]]:
    """The fastest kernel for these tensors, and why each faster one was refused."""
    refused: list[str] = []
    for kernel in KERNELS:
        reason = kernel.refusal(packed, device, dtype)
        if reason is None:
            return kernel, refused
        refused.append(f"{kernel.name}: {reason}")
    raise AssertionError("the reference refuses nothing")


def make_linear(packed: PackedWeight, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The fastest kernel for these tensors on this device in this dtype."""
    kernel, _ = choose(packed, device, dtype)
    return kernel.make(PackedWeight(*(tensor.to(device) for tensor in packed))).to(device)


def describe(packed: PackedWeight, device: torch.device, dtype: torch.dtype) -> str:
    """One line: which kernel these tensors get, and why the faster ones were refused."""
    kernel, refused = choose(packed, device, dtype)
    return kernel.name + "".join(f"; not {reason}" for reason in refused)
