"""What the system knows about the processor."""

import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")  # Linux


def processor_model() -> str:
    """The processor's name, as its maker calls it where the system knows that."""
    lines = _cpuinfo()
    if lines is None:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def processor_features() -> str:
    """The model and the features of the processor: a text that changes with what a compiler may use of it."""
    lines = _cpuinfo()
    if lines is None:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}))


def _cpuinfo() -> list[str] | None:
    try:
        return CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
