"""Linear layers whose weights stay packed in 4 bits, and the choice of the fastest one.

A kernel is an `nn.Module` made from the tensors in the file; its forward takes [..., K] and returns [..., N] in the
dtype of its input. `reference.py` is what every other kernel is tested against, and the fallback everywhere. The
compiled kernels in `native/` have an interface of their own, because they run a whole model in one call.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from gemma_awq_cli.awq.packing import PackedWeight
from gemma_awq_cli.kernels.cpu import CpuInt4Linear
from gemma_awq_cli.kernels.cuda import CudaInt4Linear
from gemma_awq_cli.kernels.file_int4 import FileInt4Linear
from gemma_awq_cli.kernels.mps import MpsInt4Linear
from gemma_awq_cli.kernels.reference import ReferenceLinear
from gemma_awq_cli.kernels.triton import TritonLinear

# Makes a module that multiplies by a packed weight on a device, in a dtype.
MakeLinear = Callable[[PackedWeight, torch.device, torch.dtype], nn.Module]


class PackedLinear(Protocol):
    """The interface of the kernels' classes."""

    def __call__(self, weight: PackedWeight, /) -> nn.Module: ...

    def refusal(self, weight: PackedWeight, device: torch.device, dtype: torch.dtype, /) -> str | None:
        """Why the kernel cannot take these tensors on this device in this dtype, or None."""
        ...


@dataclass(frozen=True)
class Kernel:
    """A kernel's class, and the name that users see."""

    name: str
    linear: PackedLinear


# Best first.
KERNELS = (
    Kernel("PyTorch's int4 product for CPUs", CpuInt4Linear),
    Kernel("PyTorch's int4 product for CUDA", CudaInt4Linear),
    Kernel("PyTorch's int4 product for Apple's GPUs", MpsInt4Linear),
    Kernel("a Triton product of this project", FileInt4Linear),
    Kernel("AutoAWQ's Triton product", TritonLinear),
    Kernel("unpack and multiply", ReferenceLinear),
)


def choose(packed: PackedWeight, device: torch.device, dtype: torch.dtype) -> tuple[Kernel, list[str]]:
    """Return the fastest kernel for these tensors, and why each faster one cannot take them."""
    refused: list[str] = []
    for kernel in KERNELS:
        reason = kernel.linear.refusal(packed, device, dtype)
        if reason is None:
            return kernel, refused
        refused.append(f"{kernel.name}: {reason}")
    raise AssertionError("the reference kernel takes everything")


def make_linear(packed: PackedWeight, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Make a linear of the fastest kernel for these tensors on this device in this dtype."""
    kernel, _ = choose(packed, device, dtype)
    return kernel.linear(PackedWeight(*(tensor.to(device) for tensor in packed))).to(device)


def describe(packed: PackedWeight, device: torch.device, dtype: torch.dtype) -> str:
    """Return one line: which kernel these tensors get, and why the faster ones cannot take them."""
    kernel, refused = choose(packed, device, dtype)
    return kernel.name + "".join(f"; not {reason}" for reason in refused)
