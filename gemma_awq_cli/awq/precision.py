"""How exactly is computed: float32 products, and where sums are kept wider."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """`medium` multiplies float32 in bf16 with float32 sums where the processor has it; `highest` is plain float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def widest_float(device: torch.device) -> torch.dtype:
    """float64 where the device has it; Apple's GPUs do not."""
    return torch.float32 if device.type == "mps" else torch.float64
