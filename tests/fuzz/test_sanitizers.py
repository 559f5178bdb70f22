"""The compiled kernels access no memory that is not theirs, and do nothing that C++ leaves undefined."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import sanitizers
from tests.fuzz.cases import Case
from tests.fuzz.harness import Counts, Harness, cases_of, run_and_count

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sanitizer is preloaded as on Linux"),
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = sanitizers.build(tmp_path_factory.mktemp("sanitized"))
    if isinstance(made, str):
        pytest.skip(made)
    return made


def test_the_kernels_tests_pass_under_the_sanitizers(library: Path, thorough: bool) -> None:
    done = sanitizers.run_tests(library, sanitizers.TESTS if thorough else sanitizers.QUICK_TESTS)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    assert " passed" in done.stdout


@pytest.mark.thorough
def test_damaged_models_do_nothing_to_memory(library: Path, tmp_path: Path, harness: Harness) -> None:
    counts = Counts()
    shutil.copytree(
        harness.root, tmp_path, dirs_exist_ok=True, symlinks=True, ignore=shutil.ignore_patterns("work", "std*")
    )
    with Harness(tmp_path, sanitizers.environment(), sanitized=library) as sanitized:
        sound = [Case("sound", n, base, [], ["run", "-m", "model", "--max-new-tokens", "2", "x"]) for n, base in
                 enumerate(("gemma", "gemma2-awq", "gemma3_text-awq"))]  # fmt: skip
        results = [result for _, result in sanitized.run(sound)]
        assert [result.code for result in results] == [0, 0, 0], "\n".join(map(str, results))
        cases = [case for case in cases_of(sanitized, sanitizers.FORWARDS, 150, 50_001) if case.arguments[0] == "run"]
        run_and_count(sanitized, cases, counts)
    died = [finding.told() for finding in counts.findings if finding.result.died]
    assert not died, "\n" + "\n".join(died)


def test_a_read_outside_is_seen(library: Path) -> None:
    """The sanitizer works: a linear that claims more inputs than it was given ends the process."""
    code = (
        "import numpy as np\nfrom gemma_awq_cli.kernels.native import linear, library\n"
        "from gemma_awq_cli.system.arrays import BFLOAT16\n"
        f"made = library.Library({str(library)!r})\n"
        "whole = linear.dense([np.zeros((16, 64), BFLOAT16)])\n"
        "whole.spec.inputs = 1 << 16\n"
        "linear.apply(made, whole, np.zeros((1, 64), np.float32))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **sanitizers.environment()}, cwd=sanitizers.PROJECT,
        capture_output=True, text=True, errors="replace", check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "AddressSanitizer" in done.stderr
