"""The compiled kernels under AddressSanitizer and UndefinedBehaviorSanitizer, where the compiler has them.

`make sanitize`, or `python -m tests.fuzz.sanitizers --cases 2000`, runs the kernels' own tests and cases of the harness
on a library that ends the process at the first byte that is read or written outside of what was allocated.
test_sanitizers.py runs some of these tests in every test run. This file is also a plugin of pytest
(`-p tests.fuzz.sanitizers --sanitized FILE.so`) that makes those tests use that library.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemma_awq_cli.kernels.native import library as native_library

PROJECT = Path(__file__).parent.parent.parent
FLAGS = (
    # a product and a sum rounded once, as in the shipped library: tests compare tokens that rounding can change
    "-O1", "-fexpensive-optimizations", "-g", "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all",
)  # fmt: skip
QUICK_TESTS = ("tests/kernels/test_native.py", "tests/models/forward/test_unlike_layers.py")
TESTS = (
    *QUICK_TESTS,
    "tests/models/forward/test_torch_decoder.py",
    "tests/models/forward/test_compiled_decoder.py",
    "tests/models/forward/test_last_logits.py",
)
FORWARDS = ("config", "weights", "packed", "generation")  # kinds whose cases reach the kernels


def build(folder: Path) -> Path | str:
    """Compile the sanitized library into `folder`; return its path, or why it is unavailable."""
    compiler = native_library.find_compiler()
    if compiler is None:
        return "no C++ compiler was found"
    if any(not Path(found).is_file() for found in runtimes(compiler)):
        return f"{compiler[0]} has no libasan"
    shipped = [flag for flag in native_library.FLAGS if flag != "-O3"]
    made = folder / "sanitized.so"
    source = native_library.SOURCES / "engine.cpp"
    command = [*compiler, *shipped, *native_library.processor_flags(), *FLAGS, str(source), "-o", str(made)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise AssertionError(f"the kernels do not compile: {done.stderr[:3000]}")
    return made


def runtimes(compiler: list[str]) -> list[str]:
    """The libraries to load before all others: the sanitizer's, and that of C++ exceptions."""
    asked = ([*compiler, f"-print-file-name={name}"] for name in ("libasan.so", "libstdc++.so"))
    return [subprocess.run(one, capture_output=True, text=True, check=True).stdout.strip() for one in asked]


def environment() -> dict[str, str]:
    """The environment variables with which a process can load the sanitized library."""
    return {
        "LD_PRELOAD": " ".join(runtimes(native_library.find_compiler() or [])),
        # Python and torch keep memory until the end; an allocation that is too large fails and does not end the process
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:allocator_may_return_null=1:handle_segv=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1:abort_on_error=1",
        "OMP_NUM_THREADS": "1",
    }


def use(path: Path) -> None:
    """Make everything that opens a model in this process use this library."""
    made = native_library.Library(path)
    real, asked = native_library.load, os.environ.get("CXX")

    def load(folder: Path) -> Any:
        return made if os.environ.get("CXX") == asked else real(folder)  # a test of another compiler

    native_library.load = load  # type: ignore[assignment]


def run_tests(library: Path, tests: Sequence[str] = TESTS) -> subprocess.CompletedProcess[str]:
    """Run tests of the kernels on the sanitized library."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "tests.fuzz.sanitizers"]
    return subprocess.run(
        [*command, "--sanitized", str(library), *tests], cwd=PROJECT, env={**os.environ, **environment()},
        capture_output=True, text=True, errors="replace", check=False,
    )  # fmt: skip


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--sanitized", type=Path, required=True, help="The sanitized library.")


def pytest_configure(config: Any) -> None:
    use(config.getoption("--sanitized"))


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Leave out the tests of compiling and loading, which have a library of their own."""
    compiling = ("compiler", "monkeypatch")
    kept = [item for item in items if "test_native" not in item.nodeid or "library" in item.fixturenames]
    kept = [item for item in kept if "test_native" not in item.nodeid or not set(compiling) & set(_asked(item))]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def _asked(item: Any) -> tuple[str, ...]:
    """The fixtures that a test itself asks for."""
    return tuple(item._fixtureinfo.argnames)


def main() -> int:
    from tests.fuzz.harness import Counts, Harness, cases_of, run_and_count

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.sanitizers", description=__doc__)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kind", action="append", help="Only this kind of case; can be repeated.")
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
