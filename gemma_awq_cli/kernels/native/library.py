"""The compiled library: built at first use into the cache folder, and loaded from there.

Code that lies in a folder is run, so the folder must be the user's own, and a file there must be what was built: its
name carries the hash of its bytes, and one that is damaged is built anew.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from contextlib import suppress
from ctypes import c_char_p
from functools import cache
from pathlib import Path

from gemma_awq_cli.kernels.native.structures import ARGUMENTS
from gemma_awq_cli.system.failures import first_line, reason_of

SOURCES = Path(__file__).parent
COMPILE_SECONDS = 600  # it takes some twenty
_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-w",
    # NaN and infinity keep their meaning: a damaged weight must be seen in the logits
    "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
)  # fmt: skip


class Library:
    """The functions of engine.cpp. instructions: what its arithmetic was compiled for."""

    def __init__(self, path: Path) -> None:
        handle = ctypes.CDLL(str(path))
        for name, arguments in ARGUMENTS.items():
            function = getattr(handle, name)
            function.argtypes = arguments
            function.restype = None
        handle.gaq_instructions.restype = c_char_p
        self.instructions: str = handle.gaq_instructions().decode()
        self.forward = handle.gaq_forward
        self.large_pages = handle.gaq_large_pages
        self.linear = handle.gaq_linear
        self.pack_awq = handle.gaq_pack_awq
        self.quantize = handle.gaq_quantize


@cache
def load(folder: Path) -> Library | str:
    """The library, compiled into `folder` unless it lies there already; or why there is none."""
    compiler = find_compiler()
    if compiler is None:
        return "no C++ compiler is there (c++, g++, clang++ or CXX)"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if refused := _distrust(folder):
            return refused
        command = [*compiler, *_FLAGS, *_processor_flags()]
        key = _key(command)
        library = _load_built(folder, key) or _load_new(folder, key, command)
    except OSError as error:
        return f"they cannot be compiled into {folder} ({reason_of(error)})"
    if isinstance(library, str):
        return library
    return library if library.instructions else "this processor has neither AVX-512 VNNI nor AVX2"


def find_compiler() -> list[str] | None:
    """The words of `CXX` (`ccache g++`, `g++ -O2`), else the first compiler that is there."""
    asked = os.environ.get("CXX", "").strip()
    if not asked:
        return next(([path] for path in map(shutil.which, _COMPILERS) if path), None)
    if whole := shutil.which(asked):  # a path with spaces
        return [whole]
    try:
        words = shlex.split(asked, posix=os.name != "nt")
    except ValueError:  # a quotation without its end
        return None
    found = shutil.which(words[0]) if words else None
    return [found, *words[1:]] if found else None


def _distrust(folder: Path) -> str | None:
    """Why code in `folder` may be another user's, with what to do; None if it is this user's alone."""
    if not hasattr(os, "geteuid"):  # Windows: the cache lies in the user's profile
        return None
    ours = (os.geteuid(), 0)  # what root installs is trusted anyway
    target = folder.stat()
    if target.st_uid not in ours or folder.lstat().st_uid not in ours:
        return f"{folder} belongs to another user; remove it, or set GEMMA_AWQ_CACHE to a folder of your own"
    if target.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"other users can write to {folder}; remove it, and it is made anew for you alone"
    return None


def _load_built(folder: Path, key: str) -> Library | None:
    """The library that lies in `folder` whole; whatever claims its name and is not is removed."""
    for path in sorted(folder.glob(f"native-{key}-*.so")):
        if _is_whole(path):
            with suppress(OSError, AttributeError):  # another machine's perhaps
                return Library(path)
        path.unlink()
    return None


def _is_whole(path: Path) -> bool:
    """Whether a file is this user's and its bytes are those that its name tells of."""
    try:
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)), "rb") as file:
            status = os.fstat(file.fileno())
            if hasattr(os, "geteuid") and (
                status.st_uid not in (os.geteuid(), 0) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
            ):
                return False
            return path.stem.endswith(f"-{hashlib.sha256(file.read()).hexdigest()}")
    except OSError:
        return False


def _load_new(folder: Path, key: str, command: list[str]) -> Library | str:
    """The library, compiled now; or why that failed."""
    with tempfile.TemporaryDirectory(dir=folder) as building:
        made = Path(building) / "native.so"
        arguments = [*command, str(SOURCES / "engine.cpp"), "-o", str(made)]
        failed = None
        try:
            subprocess.check_output(
                arguments, stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT,
                env={**os.environ, "TMPDIR": building}, timeout=COMPILE_SECONDS,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"{command[0]} did not compile them within {COMPILE_SECONDS} seconds"
        except subprocess.CalledProcessError as error:
            # a compiler speaks the encoding of its own locale
            lines = error.output.decode("utf-8", "replace").strip().splitlines()
            failed = lines[0][:300] if lines else f"exit code {error.returncode}"
        if failed or not made.is_file():
            return f"{command[0]} cannot compile them ({failed or 'it made no file'})"
        made.chmod(0o700)
        path = folder / f"native-{key}-{hashlib.sha256(made.read_bytes()).hexdigest()}.so"
        made.replace(path)  # whole or not at all
    try:
        return Library(path)
    except (OSError, AttributeError) as error:
        return f"the compiled kernels cannot be loaded ({first_line(error)})"


def _processor_flags() -> list[str]:
    return ["-mcpu=native"] if platform.machine() in ("arm64", "aarch64") else ["-march=native"]


def _key(command: list[str]) -> str:
    """Changes with the sources, the compiler, its flags and the processor."""
    digest = hashlib.sha256()
    for source in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")]):
        digest.update(source.read_bytes())
    digest.update(f"{command} {platform.machine()}".encode())
    for program in filter(None, map(shutil.which, command)):  # ccache, and the compiler that it calls
        real = Path(program).resolve()
        digest.update(f"{real} {real.stat().st_size} {real.stat().st_mtime_ns}".encode())
    digest.update(_processor().encode())
    return digest.hexdigest()[:16]


def _processor() -> str:
    """The processor's model and features, as Linux lists them; elsewhere what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "".join(sorted({line for line in lines if line.startswith(wanted)}))
