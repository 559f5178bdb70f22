"""The compiled kernels are clean C++: no compiler warns about them, whatever instruction set they are compiled for."""

import platform
import subprocess
from pathlib import Path

import pytest

from gemma_awq_cli.kernels.native import library as native_library

WARNINGS = (
    "-Wall", "-Wextra", "-Wshadow", "-Werror",
    "-Wno-uninitialized", "-Wno-maybe-uninitialized",  # GCC's own AVX-512 headers, inlined into ours
    "-Wno-psabi",  # how vectors are passed without AVX: all functions that take them are inlined
)  # fmt: skip
# On x86-64: the instructions of this processor, of most processors, and of none in particular.
PROCESSORS = (["-march=native"], ["-march=x86-64-v3"], ["-march=x86-64"])


@pytest.mark.parametrize("processor", PROCESSORS, ids=lambda flags: flags[0])
def test_the_kernels_compile_without_a_warning(processor: list[str], tmp_path: Path) -> None:
    compiler = native_library.find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    if platform.machine() != "x86_64":
        if processor != PROCESSORS[0]:
            pytest.skip("for x86-64 only")
        processor = native_library.processor_flags()
    shipped = [flag for flag in native_library.FLAGS if flag not in ("-w", "-O3")]
    # warnings that follow the flow of data need some optimization, which once is enough
    effort = "-O1" if processor == PROCESSORS[0] else "-fsyntax-only"
    command = [*compiler, *shipped, effort, *processor, *WARNINGS]
    done = subprocess.run(
        [*command, str(native_library.SOURCES / "engine.cpp"), "-o", str(tmp_path / "checked.so")],
        capture_output=True, text=True, errors="replace", check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[:3000]
