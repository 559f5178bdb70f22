"""The precision of computations: of float32 products, and of the few that need more than float32."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Of what is compared, the layers and the head: `medium` would round both sides' inputs, each in its own way,
# to bfloat16 on processors with AMX, and that would count as a difference.
MEASURED = "high"


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Set torch's precision of float32 products for a while.

    `medium` multiplies in bfloat16 with float32 sums if the processor can; `highest` is plain float32.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def widest_float(device: torch.device) -> torch.dtype:
    """Return float64 if the device has it, and float32 on Apple's GPUs, which do not."""
    return torch.float32 if device.type == "mps" else torch.float64
