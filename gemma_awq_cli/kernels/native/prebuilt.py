"""The compiled libraries that a wheel carries, one for each generation of processors, and which of them run here.

They lie in a folder of the package, which the build (`hatch_build.py`) fills; an installation from a clone or from a
wheel for every platform has none.
"""

import ctypes
from ctypes import c_char_p
from pathlib import Path

FOLDER = Path(__file__).parent / "prebuilt"
PROBE = "processor.so"  # processor.c


def runnable(folder: Path = FOLDER) -> list[Path]:
    """The libraries in `folder` that this processor can run, the fastest first."""
    try:
        probe = ctypes.CDLL(str(folder / PROBE))
    except OSError:  # there is none
        return []
    probe.gaq_runnable.restype = c_char_p
    names: str = probe.gaq_runnable().decode()
    return [path for name in names.split() if (path := folder / f"{name}.so").is_file()]
