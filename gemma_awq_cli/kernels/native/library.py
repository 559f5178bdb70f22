"""The compiled library: built at first use into the cache folder, and what it takes, in ctypes.

The structures mirror those of linear.h and engine.cpp, field by field.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

SOURCES = Path(__file__).parent
MAX_PARTS = 3
_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-w",
    # NaN and infinity keep their meaning: a damaged weight must be seen in the logits
    "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
)  # fmt: skip


class LinearSpec(ctypes.Structure):
    _fields_ = [
        ("kind", c_int32), ("group", c_int32), ("inputs", c_int64), ("outputs", c_int64),
        ("data", c_void_p), ("zeros", c_void_p),
        ("parts", c_void_p * MAX_PARTS), ("part_rows", c_int64 * MAX_PARTS),
    ]  # fmt: skip


class LayerSpec(ctypes.Structure):
    _fields_ = [
        ("qkv", LinearSpec), ("o", LinearSpec), ("gate_up", LinearSpec), ("down", LinearSpec),
        ("input_norm", c_void_p), ("attention_norm", c_void_p), ("mlp_norm", c_void_p), ("post_mlp_norm", c_void_p),
        ("q_norm", c_void_p), ("k_norm", c_void_p), ("inv_freq", c_void_p),
        ("rope_factor", c_float), ("window", c_int32),
    ]  # fmt: skip


class ModelSpec(ctypes.Structure):
    _fields_ = [
        ("hidden", c_int64), ("intermediate", c_int64), ("heads", c_int64), ("kv_heads", c_int64),
        ("head_dim", c_int64), ("layers", c_int64),
        ("eps", c_float), ("embed_scale", c_float), ("query_scale", c_float),
        ("attention_softcap", c_float), ("final_softcap", c_float),
        ("embedding", c_void_p), ("norm", c_void_p), ("head", LinearSpec), ("layer", POINTER(LayerSpec)),
        ("exact", c_void_p),
    ]  # fmt: skip


class CacheSpec(ctypes.Structure):
    _fields_ = [("keys", POINTER(c_void_p)), ("values", POINTER(c_void_p)), ("slots", POINTER(c_int64))]


class PieceSpec(ctypes.Structure):
    _fields_ = [("row", c_int64), ("start", c_int64), ("count", c_int64), ("offset", c_int64)]


_ARGUMENTS = {
    "gaq_forward": (
        POINTER(ModelSpec), POINTER(CacheSpec), POINTER(PieceSpec), c_int64, c_void_p, c_int64, POINTER(c_int64),
        c_void_p, c_int32,
    ),
    "gaq_large_pages": (c_void_p, c_int64),
    "gaq_linear": (POINTER(LinearSpec), c_void_p, c_int64, c_void_p, c_int32),
    "gaq_pack_awq": (c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_int32),
    "gaq_quantize": (c_int32, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_int32),
}  # fmt: skip


class Library:
    """The functions of engine.cpp. instructions: what its arithmetic was compiled for."""

    def __init__(self, path: Path) -> None:
        handle = ctypes.CDLL(str(path))
        for name, arguments in _ARGUMENTS.items():
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
    command = [compiler, *_FLAGS, *_processor_flags()]
    path = folder / f"native-{_key(command)}.so"
    if not path.exists():
        failed = _compile(command, path)
        if failed:
            return failed
    try:
        library = Library(path)
        return library if library.instructions else "this processor has neither AVX-512 VNNI nor AVX2"
    except (OSError, AttributeError) as error:
        return f"the compiled kernels cannot be loaded ({error})"


def find_compiler() -> str | None:
    """The path of `CXX`, else of the first compiler that is there."""
    asked = os.environ.get("CXX")
    return next(filter(None, map(shutil.which, [asked] if asked else _COMPILERS)), None)


def _processor_flags() -> list[str]:
    return ["-mcpu=native"] if platform.machine() in ("arm64", "aarch64") else ["-march=native"]


def _key(command: list[str]) -> str:
    """Changes with the sources, the compiler, its flags and the processor."""
    digest = hashlib.sha256()
    for source in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")]):
        digest.update(source.read_bytes())
    real = Path(command[0]).resolve()
    digest.update(f"{command} {real} {real.stat().st_size} {real.stat().st_mtime_ns} {platform.machine()}".encode())
    digest.update(_processor().encode())
    return digest.hexdigest()[:16]


def _processor() -> str:
    """The processor's model and features, as Linux lists them; elsewhere what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "".join(sorted({line for line in lines if line.startswith(wanted)}))


def _compile(command: list[str], path: Path) -> str | None:
    """Compile to `path`, which appears whole or not at all. Returns why that failed, if it did."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            arguments = [*command, str(SOURCES / "engine.cpp"), "-o", str(made)]
            subprocess.check_output(arguments, stderr=subprocess.STDOUT, text=True)
            made.replace(path)
    except subprocess.CalledProcessError as error:
        lines = error.output.strip().splitlines() or [f"exit code {error.returncode}"]
        return f"{command[0]} cannot compile them ({lines[0]})"
    except OSError as error:
        return f"they cannot be compiled into {path.parent} ({error.strerror})"
    return None
