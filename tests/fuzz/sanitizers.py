"""The compiled kernels under the address and the undefined-behaviour sanitizer, where a compiler has them.

`make sanitize`, or `python -m tests.fuzz.sanitizers --cases 2000`: the kernels' own tests and cases of the harness on a
library that ends the process at the first byte read outside of what was allocated. Also a plugin of pytest
(`-p tests.fuzz.sanitizers --sanitized FILE.so`), by which those tests take that library.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gemma_awq_cli.kernels.native import library as native_library

PROJECT = Path(__file__).parent.parent.parent
FLAGS = (
    "-O1", "-g", "-fno-omit-frame-pointer", "-Wall", "-Wextra",
    "-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all",
    "-Wno-uninitialized", "-Wno-maybe-uninitialized",  # of the compiler's own headers, inlined into ours
)  # fmt: skip
TESTS = (
    "tests/kernels/test_native.py",
    "tests/models/forward/test_torch_decoder.py",
    "tests/models/forward/test_last_logits.py",
)
FORWARDS = ("config", "weights", "packed", "generation")  # kinds whose cases reach the kernels


def build(folder: Path) -> Path | str:
    """The sanitized library, compiled into `folder`; or why there is none."""
    compiler = _compiler()
    if not compiler:
        return "there is no C++ compiler"
    if any(not Path(found).is_file() for found in runtimes(compiler)):
        return f"{compiler[0]} has no libasan"
    ordinary = [flag for flag in native_library._FLAGS if flag not in ("-O3", "-w")]
    made = folder / "sanitized.so"
    source = native_library.SOURCES / "engine.cpp"
    command = [*compiler, *ordinary, *native_library._processor_flags(), *FLAGS, str(source), "-o", str(made)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    ours = [line for line in done.stderr.splitlines() if "warning:" in line and str(native_library.SOURCES) in line]
    if done.returncode or ours:
        raise AssertionError("\n".join(["the kernels do not compile cleanly:", *ours, done.stderr[:3000]]))
    return made


def _compiler() -> list[str]:
    """The words that call the compiler; none if there is none."""
    found = native_library.find_compiler()
    return [found] if isinstance(found, str) else list(found or [])


def runtimes(compiler: list[str]) -> list[str]:
    """The libraries that must be in the process before anything else: of the sanitizer, and of C++ exceptions."""
    asked = ([*compiler, f"-print-file-name={name}"] for name in ("libasan.so", "libstdc++.so"))
    return [subprocess.run(one, capture_output=True, text=True, check=True).stdout.strip() for one in asked]


def environment() -> dict[str, str]:
    """What a process needs to load the sanitized library."""
    return {
        "LD_PRELOAD": " ".join(runtimes(_compiler())),
        # Python and torch keep memory until the end; what asks for too much is told so rather than ended
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:allocator_may_return_null=1:handle_segv=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1:abort_on_error=1",
        "OMP_NUM_THREADS": "1",
    }


def use(path: Path) -> None:
    """Whatever opens a model in this process takes this library."""
    made = native_library.Library(path)
    real, asked = native_library.load, os.environ.get("CXX")

    def load(folder: Path) -> Any:
        return made if os.environ.get("CXX") == asked else real(folder)  # a test of another compiler

    native_library.load = load  # type: ignore[assignment]


def run_tests(library: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """The tests of the kernels, on the sanitized library."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "tests.fuzz.sanitizers"]
    return subprocess.run(
        [*command, "--sanitized", str(library), *TESTS, *more], cwd=PROJECT, env={**os.environ, **environment()},
        capture_output=True, text=True, errors="replace", check=False,
    )  # fmt: skip


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--sanitized", type=Path, required=True, help="the sanitized library")


def pytest_configure(config: Any) -> None:
    use(config.getoption("--sanitized"))


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Tests of compiling and loading have a library of their own."""
    compiling = ("compiler", "monkeypatch")
    kept = [item for item in items if "test_native" not in item.nodeid or "library" in item.fixturenames]
    kept = [item for item in kept if "test_native" not in item.nodeid or not set(compiling) & set(_asked(item))]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def _asked(item: Any) -> tuple[str, ...]:
    """The fixtures that a test names itself."""
    return tuple(item._fixtureinfo.argnames)


def main() -> int:
    from tests.fuzz.harness import Counts, Harness, cases_of, run_and_count

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.sanitizers", description=__doc__)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kind", action="append", help="only this kind; may be given several times")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gemma-awq-sanitized-") as folder:
        made = build(Path(folder))
        if isinstance(made, str):
            print(f"skipped: {made}")
            return 0
        tested = run_tests(made)
        print(tested.stdout[-1500:], tested.stderr[-3000:])
        counts = Counts()
        with Harness(Path(folder) / "cases", environment(), sanitized=made) as harness:
            run_and_count(harness, cases_of(harness, asked.kind or FORWARDS, asked.cases, asked.seed), counts)
        print(counts.table())
        print("\n".join(finding.told() for finding in counts.findings))
    return 1 if tested.returncode or counts.findings else 0


if __name__ == "__main__":
    sys.exit(main())
