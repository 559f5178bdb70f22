"""The compiled library: one that came with the package, or one built on first use into the cache folder.

Code in the cache folder gets executed, so the folder must be the user's own, and a file in it must be what was built:
its name carries the hash of its bytes, and a damaged one is built again.
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
import time
from contextlib import suppress
from ctypes import c_char_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from gemma_awq_cli.kernels.native import prebuilt
from gemma_awq_cli.kernels.native.structures import ARGUMENTS, layout_mismatch
from gemma_awq_cli.system.failures import first_line, reason_of
from gemma_awq_cli.system.locking import Lock
from gemma_awq_cli.system.processor import processor_features

SOURCES = Path(__file__).parent
AMX = "AMX"  # as `gaq_products` names it
COMPILE_SECONDS = 600  # it takes about twenty
WAIT_SECONDS = 0.1  # between looks whether another process has compiled it
COMPILERS = ("c++", "g++", "clang++")
FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-w", "-fvisibility=hidden",
    # NaN and infinity keep their meaning: a damaged weight must show in the logits
    "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
)  # fmt: skip


class LayoutMismatchError(Exception):
    """A library whose structures are not those of structures.py."""


class Library:
    """The functions of engine.cpp.

    instructions: the instruction set that it was compiled for; empty if it has no fast kernels for this processor.
    compiler: its version, by which the last bits of sums may differ; sources: `sources_hash` of a prebuilt library,
    empty of one that was compiled on this machine.
    products: the instructions with which this processor does what `bfloat16_products` needs, the slowest first; empty
    if it has none.
    Raises LayoutMismatchError if the library lays out its structures differently from structures.py.
    """

    def __init__(self, path: Path) -> None:
        handle = ctypes.CDLL(str(path))
        for name, arguments in ARGUMENTS.items():
            function = getattr(handle, name)
            function.argtypes = arguments
            function.restype = None
        for name in ("gaq_compiler", "gaq_instructions", "gaq_layout", "gaq_products", "gaq_sources"):
            getattr(handle, name).restype = c_char_p
        if difference := layout_mismatch(handle.gaq_layout().decode()):
            raise LayoutMismatchError(difference)
        self.instructions: str = handle.gaq_instructions().decode()
        self.compiler: str = handle.gaq_compiler().decode()
        self.sources: str = handle.gaq_sources().decode()
        self.products: tuple[str, ...] = tuple(filter(None, handle.gaq_products().decode().split(",")))
        self.add_cross = handle.gaq_add_cross
        self.add_stretch = handle.gaq_add_stretch
        self.add_gram = handle.gaq_add_gram
        self.attend = handle.gaq_attend
        self.forward = handle.gaq_forward
        self.gelu = handle.gaq_gelu
        self.large_pages = handle.gaq_large_pages
        self.leading = handle.gaq_leading
        self.linear = handle.gaq_linear
        self.move_columns = handle.gaq_move_columns
        self.norm = handle.gaq_norm
        self.rotate = handle.gaq_rotate
        self.round_columns = handle.gaq_round_columns
        self.multiply = handle.gaq_multiply
        self.pack_awq = handle.gaq_pack_awq
        self.quantize = handle.gaq_quantize
        self.split = handle.gaq_split

    @property
    def multiplies_bfloat16(self) -> bool:
        """Whether this processor has any of the instructions for `products`."""
        return bool(self.products)

    @property
    def multiplies_tiles(self) -> bool:
        """Whether `products` are those of tiles."""
        return AMX in self.products


@dataclass(frozen=True)
class Unavailable:
    """Why there is no compiled library, as a clause for messages."""

    reason: str

    def __str__(self) -> str:
        return self.reason


@cache
def load(folder: Path) -> Library | Unavailable:
    """Return the library, or why it is unavailable.

    A prebuilt one where this processor runs it, unless `CXX` asks for a compiler; else one that is compiled into
    `folder`, unless it is there already.
    """
    if not asked_compiler() and (shipped := load_prebuilt()):
        return shipped
    compiler = find_compiler()
    if compiler is None:
        return Unavailable(
            "no C++ compiler was found (CXX, c++, g++ or clang++), and the package was installed without compiled "
            "kernels for this processor"
        )
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if distrust := _why_distrusted(folder):
            return Unavailable(distrust)
        command = [*compiler, *FLAGS, *processor_flags()]
        key = build_key(command)
        library = _load_built(folder, key) or _build_once(folder, key, command)
    except OSError as error:
        return Unavailable(f"they cannot be compiled into {folder} ({reason_of(error)})")
    if isinstance(library, Library) and not library.instructions:
        return Unavailable("this processor has neither AVX2 nor NEON dot products")
    return library


def load_prebuilt(folder: Path = prebuilt.FOLDER) -> Library | None:
    """Load the fastest library of `folder` that runs here and was made from the sources beside this file."""
    for path in prebuilt.runnable(folder):
        with suppress(OSError, AttributeError, LayoutMismatchError):
            library = Library(path)
            if library.sources == sources_hash():
                return library
    return None


def asked_compiler() -> str:
    """What the environment variable `CXX` says: a compiler, which then compiles the library on this machine."""
    return os.environ.get("CXX", "").strip()


def find_compiler() -> list[str] | None:
    """The words of `CXX` (`ccache g++`, `g++ -O2`) if it is set, else the first compiler that is installed, or None."""
    asked = asked_compiler()
    if not asked:
        return next(([path] for path in map(shutil.which, COMPILERS) if path), None)
    if whole := shutil.which(asked):  # a path with spaces
        return [whole]
    try:
        words = shlex.split(asked, posix=os.name != "nt")
    except ValueError:  # an unclosed quotation
        return None
    found = shutil.which(words[0]) if words else None
    return [found, *words[1:]] if found else None


def processor_flags() -> list[str]:
    """The flags that compile for the processor of this machine."""
    return ["-mcpu=native"] if platform.machine() in ("arm64", "aarch64") else ["-march=native"]


def sources_hash() -> str:
    """The hash of the C++ sources, which a prebuilt library repeats."""
    digest = hashlib.sha256()
    for source in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")]):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def build_key(command: list[str]) -> str:
    """A hash that changes with the sources, the compiler, its flags and the processor."""
    digest = hashlib.sha256(sources_hash().encode())
    digest.update(f"{command} {platform.machine()}".encode())
    for program in filter(None, map(shutil.which, command)):  # ccache, and the compiler that it calls
        real = Path(program).resolve()
        digest.update(f"{real} {real.stat().st_size} {real.stat().st_mtime_ns}".encode())
    digest.update(processor_features().encode())
    return digest.hexdigest()[:16]


def _why_distrusted(folder: Path) -> str | None:
    """Why code in `folder` could be another user's, and what to do about it; None if only this user can write there."""
    if not hasattr(os, "geteuid"):  # Windows: the cache is in the user's profile
        return None
    ours = (os.geteuid(), 0)  # what root installs is trusted anyway
    target = folder.stat()
    if target.st_uid not in ours or folder.lstat().st_uid not in ours:
        return f"{folder} belongs to another user; remove it, or set GEMMA_AWQ_CACHE to a folder of your own"
    if target.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"other users can write to {folder}; remove it, and it will be created again for you alone"
    return None


def _load_built(folder: Path, key: str) -> Library | None:
    """Load the library that an earlier run built; remove files that have its name but are damaged or do not load."""
    for path in sorted(folder.glob(f"native-{key}-*.so")):
        if _is_intact(path):
            with suppress(OSError, AttributeError, LayoutMismatchError):  # from another machine, perhaps
                return Library(path)
        path.unlink(missing_ok=True)
    return None


def _is_intact(path: Path) -> bool:
    """Whether a file is this user's and its bytes have the hash in its name."""
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


def _build_once(folder: Path, key: str, command: list[str]) -> Library | Unavailable:
    """Compile the library, or wait for that of another process, which started at the same time."""
    lock = Lock(folder / f"native-{key}.lock")
    given_up = time.monotonic() + COMPILE_SECONDS
    while not lock.acquire() and time.monotonic() < given_up:
        time.sleep(WAIT_SECONDS)
    try:
        return _load_built(folder, key) or _build(folder, key, command)
    finally:
        lock.release(remove=True)


def _build(folder: Path, key: str, command: list[str]) -> Library | Unavailable:
    """Compile the library into `folder` and load it."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / "native.so"
        if failure := _compile(command, made):
            return Unavailable(failure)
        made.chmod(0o700)
        path = folder / f"native-{key}-{hashlib.sha256(made.read_bytes()).hexdigest()}.so"
        made.replace(path)  # atomically
    try:
        return Library(path)
    except LayoutMismatchError as error:
        return Unavailable(f"the compiled kernels do not match this version's structures: {error}")
    except (OSError, AttributeError) as error:
        return Unavailable(f"the compiled kernels cannot be loaded ({first_line(error)})")


def _compile(command: list[str], made: Path) -> str | None:
    """Compile engine.cpp into the file `made`, with temporary files beside it; return why that failed, or None."""
    failed = None
    try:
        subprocess.check_output(
            [*command, str(SOURCES / "engine.cpp"), "-o", str(made)], stdin=subprocess.DEVNULL,
            stderr=subprocess.STDOUT, env={**os.environ, "TMPDIR": str(made.parent)}, timeout=COMPILE_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"{command[0]} did not compile them within {COMPILE_SECONDS} seconds"
    except subprocess.CalledProcessError as error:
        # a compiler writes in the encoding of its own locale
        lines = error.output.decode("utf-8", "replace").strip().splitlines()
        failed = lines[0][:300] if lines else f"exit code {error.returncode}"
    if failed or not made.is_file():
        return f"{command[0]} cannot compile them ({failed or 'it wrote no file'})"
    return None
