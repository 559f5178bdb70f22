"""Trials of kernels on known numbers: no GPU was there to prove them on, so each one that comes must."""

import importlib.util
import subprocess
from collections.abc import Callable, Sequence

import torch
from torch import nn

from gemma_awq_cli.awq.grid import Grid, dequantize
from gemma_awq_cli.awq.packing import PackedWeight, pack_weight
from gemma_awq_cli.system.failures import first_line

TOLERANCE = 0.01  # of the product: bfloat16 rounds by 0.4 %
_GROUP = 64


def problem_with(
    make: Callable[[PackedWeight], nn.Module],
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int],
    rows: Sequence[int],
) -> str | None:
    """Why a kind of linear is not to be used on a device in a dtype, or None.

    shape: outputs and inputs of the trial, whose groups are of 64; rows: how many rows are multiplied.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    q = torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8)
    sizes = torch.rand(shape[0], shape[1] // _GROUP, generator=generator)
    grid = Grid(
        (sizes + 0.5).to(torch.bfloat16).float(), torch.randint(0, 16, sizes.shape, generator=generator).float()
    )
    x = torch.randn(max(rows), shape[1], generator=generator).to(dtype)
    expected = x.float() @ dequantize(q, grid).t()

    def multiply() -> str | None:
        linear = make(PackedWeight(*(tensor.to(device) for tensor in pack_weight(q, grid))))
        for count in rows:
            found = linear(x[:count].to(device)).cpu().float()
            if not (found - expected[:count]).norm() <= TOLERANCE * expected[:count].norm():  # also if it is NaN
                return f"it multiplies known numbers wrongly here ({count} rows)"
        return None

    return problem_in(multiply, "it fails here")


def problem_in(trial: Callable[[], str | None], failing: str) -> str | None:
    """Return what a trial returns, or that it failed: `failing`, and why. Raises if memory ran out."""
    try:
        return trial()
    except _failures() as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return f"{failing}: {first_line(error)}"


def _failures() -> tuple[type[Exception], ...]:
    """What PyTorch and Triton raise where a kernel cannot run.

    Triton asserts that the driver's library is there, and calls a C compiler and an assembler.
    """
    found: tuple[type[Exception], ...] = (RuntimeError, AssertionError, OSError, subprocess.SubprocessError)
    if importlib.util.find_spec("triton") is not None:
        from triton.errors import TritonError

        found = (*found, TritonError)
    return found
