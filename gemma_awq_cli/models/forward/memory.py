"""How much memory there is, and errors that tell the user what to do when there is too little."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_awq_cli.errors import GemmaAwqError

if TYPE_CHECKING:
    import torch


def available_memory() -> int | None:
    """Bytes that the system could allocate now; None where it does not tell (all but Linux)."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def free_memory(device: "torch.device | str") -> int | None:
    """Bytes that could be allocated on a device now; None where that is unknown."""
    if str(device).startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    return available_memory()


def device_memory(device: "torch.device") -> int | None:
    """Bytes of a CUDA device's own memory; None for a device that shares the system's."""
    if device.type != "cuda":
        return None
    import torch

    return int(torch.cuda.mem_get_info(device)[1])


def copies_from_pinned(device: "torch.device") -> bool:
    """Whether copies to a device are faster from memory that the system cannot move."""
    if device.type != "cuda":
        return False
    import torch

    return torch.backends.cuda.is_built()


def peak_device_memory(device: "torch.device") -> int | None:
    """The most bytes that torch has allocated on a CUDA device; None where torch does not tell."""
    if device.type != "cuda":
        return None
    import torch

    return int(torch.cuda.max_memory_allocated(device))


def require_memory(needed: int, device: "torch.device | str", what: str, hint: str) -> None:
    """Raise GemmaAwqError if `what` needs more bytes than the device has free, before the system kills processes."""
    free = free_memory(device)
    if free is not None and needed > free:
        raise GemmaAwqError(
            f"{what} needs at least {needed / 1e9:.1f} GB of memory, and {device} has {free / 1e9:.1f} GB free.", hint
        )


# of errors that are no `MemoryError`: PyTorch's on the CPU, the system's, CUDA's outside PyTorch's own allocator, as in
# a library's workspace (CUBLAS_STATUS_ALLOC_FAILED, CUSOLVER_STATUS_ALLOC_FAILED)
_REFUSALS = ("can't allocate memory", "Cannot allocate memory", "out of memory", "_STATUS_ALLOC_FAILED")


def is_refusal(error: BaseException) -> bool:
    """Whether an allocator failed: Python's, a GPU's, PyTorch's on the CPU, or the system's mapping of a file."""
    torch = sys.modules.get("torch")  # a GPU's allocator is torch's
    return (
        isinstance(error, MemoryError)
        or (torch is not None and isinstance(error, torch.OutOfMemoryError))
        or any(words in str(error) for words in _REFUSALS)
    )


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
_REUSED_BYTES = 32 << 20  # the largest block that is used again; larger ones go back at once
_KEPT_BYTES = 64 << 20


@contextmanager
def memory_errors(what: str, hint: str) -> Iterator[None]:
    """Turn allocators' failures into `GemmaAwqError("Out of memory while {what}.", hint)`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_refusal(error):
            raise
        raise GemmaAwqError(f"Out of memory while {what}.", hint) from None


def return_freed_memory() -> None:
    """Hand memory that is free again back to the system, where the C library keeps it (glibc).

    Results of an expert that stay lie between larger blocks that were freed: 13 MB per expert of Gemma 4 26B-A4B.
    """
    _tell_allocator("malloc_trim", 0)


def reuse_freed_memory() -> None:
    """Let this process keep some memory that is free again until `return_freed_memory` (glibc).

    A layer's intermediate results are megabytes each, and last for one operation. Left to itself, the C library hands
    many of them back to the system, which clears the same pages again for the next one.
    """
    _tell_allocator("mallopt", _M_MMAP_THRESHOLD, _REUSED_BYTES)
    _tell_allocator("mallopt", _M_TRIM_THRESHOLD, _KEPT_BYTES)


def use_one_heap() -> None:
    """Let all threads of this process allocate from one heap, where the C library would give each its own (glibc).

    What one thread frees, another can then have: the memory of a server whose prefix cache is full stays as it is,
    where it grew by 3 kB with each request. Heaps that threads have by then stay.
    """
    _tell_allocator("mallopt", _M_ARENA_MAX, 1)


def _tell_allocator(function: str, *arguments: int) -> None:
    """Call a function of the C library that only some have (glibc)."""
    found = getattr(ctypes.CDLL(None), function, None) if sys.platform == "linux" else None
    if found is not None:
        found(*arguments)


def peak_memory() -> int | None:
    """This process's largest resident set in bytes; None where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
