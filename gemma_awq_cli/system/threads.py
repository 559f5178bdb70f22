"""How many threads compute: one number for the compiled kernels and for torch, whether torch is imported or not."""

import os
import sys

_VARIABLE = "OMP_NUM_THREADS"  # torch reads it when it is imported


def set_threads(count: int) -> None:
    """Compute with `count` threads from now on."""
    os.environ[_VARIABLE] = str(count)
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(count)


def thread_count() -> int:
    """How many threads compute: what was set, or else as many as this process may use processors."""
    if (torch := sys.modules.get("torch")) is not None and hasattr(torch, "get_num_threads"):
        return int(torch.get_num_threads())
    stated = os.environ.get(_VARIABLE, "")
    return int(stated) if stated.isascii() and stated.isdigit() and int(stated) else usable_processors()


def usable_processors() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
