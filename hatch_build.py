"""Compiled kernels for a wheel: GEMMA_AWQ_WHEEL=linux-x86_64 pip wheel --no-deps -w dist .

Without that variable the wheel has none and fits every platform; the kernels are then compiled at first use. The
compiler is Zig's, which compiles for every platform below on any machine; `CXX` names another one, whose wheel is for
Linux on x86-64 and asks for the system's libraries of the machine that compiled it.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))

from gemma_awq_cli.kernels.native.library import FLAGS, SOURCES, sources_hash  # noqa: E402
from gemma_awq_cli.kernels.native.prebuilt import FOLDER, PROBE  # noqa: E402

ZIG = "ziglang==0.17.1"
EXPORTS = "{ global: gaq_*; local: *; };"


@dataclass(frozen=True)
class Platform:
    """target, tag: as Zig and wheels call it; libraries: the name of each, which processor.c knows -> its processor."""

    target: str
    tag: str
    libraries: dict[str, str]


X86 = {"avx2": "x86_64_v3", "avx_vnni": "x86_64_v3+avxvnni", "avx512_vnni": "x86_64_v4+avx512vnni"}
ARM = {"dotprod": "generic+v8_2a+fullfp16+dotprod", "i8mm": "generic+v8_2a+fullfp16+dotprod+i8mm"}
APPLE = {"dotprod": "apple_m1", "i8mm": "apple_m2"}
PLATFORMS = {
    "linux-x86_64": Platform("x86_64-linux-gnu.2.17", "manylinux_2_17_x86_64", X86),
    "linux-arm64": Platform("aarch64-linux-gnu.2.17", "manylinux_2_17_aarch64", ARM),
    "macos-arm64": Platform("aarch64-macos.11.0", "macosx_11_0_arm64", APPLE),
    "windows-x86_64": Platform("x86_64-windows-gnu", "win_amd64", X86),
}
# The same processors, as GCC and Clang call them.
GCC_X86 = {
    "avx2": ["-march=x86-64-v3"],
    "avx_vnni": ["-march=x86-64-v3", "-mavxvnni"],
    "avx512_vnni": ["-march=x86-64-v4", "-mavx512vnni"],
}


class PrebuiltKernels(BuildHookInterface):  # type: ignore[type-arg]
    """Compiles the libraries, and puts them into the wheel."""

    PLUGIN_NAME = "custom"
    made: Path | None = None

    def dependencies(self) -> list[str]:
        return [ZIG] if self._platform() and not os.environ.get("CXX") else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        platform = self._platform()
        if platform is None or version == "editable":
            return
        self.made = Path(tempfile.mkdtemp())
        compile_all(platform, self.made)
        for library in self.made.glob("*.so"):
            build_data["force_include"][str(library)] = str((FOLDER / library.name).relative_to(ROOT))
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{'linux_x86_64' if os.environ.get('CXX') else platform.tag}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if self.made:
            shutil.rmtree(self.made)

    def _platform(self) -> Platform | None:
        name = os.environ.get("GEMMA_AWQ_WHEEL")
        if not name or self.target_name != "wheel":
            return None
        if name not in PLATFORMS:
            raise SystemExit(f"GEMMA_AWQ_WHEEL is {name}; it can be {', '.join(PLATFORMS)}")
        if os.environ.get("CXX") and name != "linux-x86_64":
            raise SystemExit(f"unset CXX: the compiler for {name} is Zig")
        return PLATFORMS[name]


def compile_all(platform: Platform, to: Path) -> None:
    """Compile the probe and the libraries of a platform into the folder `to`."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(lambda command: subprocess.run(command, check=True), commands(platform, to)))


def commands(platform: Platform, to: Path) -> list[list[str]]:
    """A compiler's command for the probe and for each library."""
    (to / "exports").write_text(EXPORTS)
    script = [f"-Wl,--version-script={to / 'exports'}"] if "linux" in platform.target else []
    zig = [sys.executable, "-m", "ziglang"]
    own = shlex.split(os.environ.get("CXX", ""))
    probe = own or [*zig, "cc", "-target", platform.target]
    made = [
        [
            *probe,
            "-O2",
            "-fPIC",
            "-shared",
            "-s",
            "-fvisibility=hidden",
            str(SOURCES / "processor.c"),
            "-o",
            str(to / PROBE),
        ]
    ]
    for name, processor in platform.libraries.items():
        chosen = (
            [*own, *GCC_X86[name], "-static-libstdc++", "-static-libgcc"]
            if own
            else [*zig, "c++", "-target", platform.target, f"-mcpu={processor}"]
        )
        stated = f'-DGAQ_SOURCES="{sources_hash()}"'
        made.append([*chosen, *FLAGS, "-s", *script, stated, str(SOURCES / "engine.cpp"), "-o", str(to / f"{name}.so")])
    return made
