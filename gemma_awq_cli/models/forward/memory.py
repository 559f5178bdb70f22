"""How much memory there is, and what a refusal of it says to the user."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from gemma_awq_cli.errors import GemmaAwqError


def available_memory() -> int | None:
    """Bytes that the system could give now, where it tells (Linux)."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def require_memory(needed: int, device: torch.device, what: str, hint: str) -> None:
    """An error if `needed` bytes are more than the device has now: before the system starts to kill processes."""
    if device.type == "cuda":
        there: int | None = torch.cuda.mem_get_info(device)[0]
    else:
        there = available_memory()
    if there is not None and needed > there:
        raise GemmaAwqError(
            f"{what} needs at least {needed / 1e9:.1f} GB of memory, and {device} has {there / 1e9:.1f} GB free.", hint
        )


def is_refusal(error: BaseException) -> bool:
    """Whether an allocator refused: Python's, a GPU's, PyTorch's own on the CPU, or the system's mapping of a file."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        said in str(error) for said in ("can't allocate memory", "Cannot allocate memory")
    )


@contextmanager
def memory_errors(what: str, hint: str) -> Iterator[None]:
    """Turn the allocators' refusals into an error that says what to make smaller."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_refusal(error):
            raise
        raise GemmaAwqError(f"Out of memory while {what}.", hint) from None


def peak_memory() -> int | None:
    """This process's largest resident set in bytes, where the system tells."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
