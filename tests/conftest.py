"""Shared fixtures: one tiny checkpoint and one artifact of every family, made once a session."""

import os
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch

from gemma_awq_cli.calibration_text.recipes import find_recipe
from gemma_awq_cli.calibration_text.rows import Rows, build_rows
from gemma_awq_cli.cli.app import main
from gemma_awq_cli.kernels.native import library as native_library
from gemma_awq_cli.kernels.native.library import Library
from gemma_awq_cli.models.text.prompter import Prompter
from gemma_awq_cli.quantize.quality import DEFAULT_QUALITY, QUALITIES, Quality, heldout_samples
from tests import samples
from tests.tiny import CONFIGS, TEXT, TEXT_MODELS, make_checkpoint

# A shell starts its background jobs with SIGINT ignored, nohup with SIGHUP: the commands that are tested would heed it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
# Tiny models gain nothing from threads, and beside other work these wait for one another longer than they compute.
THREADS = 1
torch.set_num_threads(THREADS)
os.environ["OMP_NUM_THREADS"] = str(THREADS)  # of child processes: the sums repeat only for as many
SLOW = 8.0  # seconds from which on a test should be marked so
TIMES = {"demo": 60.0, "slow": 8.0}  # roughly, of a test with such a marker
pytest_plugins = ["tests.warm_python"]
FUZZ = Path(__file__).parent / "fuzz"
FAMILIES = sorted(CONFIGS)
# for tests of the computation alone: a family with towers differs from its language model in the names of tensors
FORWARDS = samples.of(FAMILIES, TEXT_MODELS)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-cases", type=int, default=100, help="how many cases tests/fuzz makes (default: 100)")
    parser.addoption(
        "--thorough", action="store_true", help="try every place where otherwise a sample is tried (an hour or more)"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the fuzzer's tests, leave out what `--thorough` adds, and put the files that take longest first.

    A long one at the end would keep one core busy alone.
    """
    if not config.getoption("--thorough"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("thorough")])
        items[:] = [item for item in items if not item.get_closest_marker("thorough")]
    seconds: Counter[Path] = Counter()
    for item in items:
        if item.path.is_relative_to(FUZZ):
            item.add_marker(pytest.mark.slow)
        seconds[item.path] += next((time for name, time in TIMES.items() if item.get_closest_marker(name)), 0.1)
    items.sort(key=lambda item: -seconds[item.path])  # stable: a file's tests stay in their order


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name the tests that should have the marker: a list of what was slow once would grow old."""
    for report in terminalreporter.getreports("passed"):
        if report.when == "call" and report.duration > SLOW and not {"slow", "demo"} & set(report.keywords):
            terminalreporter.write_line(f"{report.nodeid} took {report.duration:.0f} s and is not marked as slow")


@pytest.fixture(scope="session")
def thorough(pytestconfig: pytest.Config) -> bool:
    """Whether to try every place where otherwise a sample is tried."""
    return bool(pytestconfig.getoption("--thorough"))


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """A test may compute with another number of threads; the next one does not."""
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture
def with_feedback(monkeypatch: pytest.MonkeyPatch) -> None:
    """`fast` with feedback between rows, which only slower qualities have."""
    fast = QUALITIES["fast"]
    fed = replace(fast, effort=fast.effort._replace(feedback=1.0))
    monkeypatch.setitem(cast(dict[str, Quality], QUALITIES), "fast", fed)


@pytest.fixture(scope="session")
def native_folder(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the compiled kernels lie, for all workers of a session: compiling takes twenty seconds."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if hasattr(pytestconfig, "workerinput") else own) / "native"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def library(native_folder: Path) -> Library:
    """The compiled kernels; without them a test is skipped."""
    loaded = native_library.load(native_folder)
    if not isinstance(loaded, Library):
        pytest.skip(loaded.reason)
    return loaded


def make_cache(folder: Path, native_folder: Path) -> Path:
    """A cache folder in which nothing lies but the compiled kernels."""
    folder.mkdir(exist_ok=True)
    (folder / "native").symlink_to(native_folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _sessions_cache(tmp_path_factory: pytest.TempPathFactory, native_folder: Path) -> Iterator[None]:
    """What a whole module shares is made before a test has a cache of its own, and is not to find the user's either."""
    with pytest.MonkeyPatch.context() as patch:
        _leave_the_user_alone(patch, make_cache(tmp_path_factory.mktemp("session") / "cache", native_folder))
        yield


@pytest.fixture(scope="session")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(autouse=True)
def _own_cache(caches: Path, native_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes what the user's own cache holds, and none reaches the network."""
    _leave_the_user_alone(monkeypatch, make_cache(Path(tempfile.mkdtemp(dir=caches)), native_folder))


def _leave_the_user_alone(patch: pytest.MonkeyPatch, cache: Path) -> None:
    patch.setenv("GEMMA_AWQ_CACHE", str(cache))
    patch.delenv("GEMMA_AWQ_MODEL", raising=False)
    patch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i}. {TEXT}" for i in range(60)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """family -> its tiny checkpoint; Gemma 2's is sharded."""
    root = tmp_path_factory.mktemp("checkpoints")

    def get(kind: str) -> Path:
        folder = root / kind
        return folder if folder.exists() else make_checkpoint(folder, kind, sharded=kind == "gemma2")

    return get


@pytest.fixture(scope="session")
def artifacts(
    tmp_path_factory: pytest.TempPathFactory, checkpoints: Callable[[str], Path], text_file: Path, native_folder: Path
) -> Callable[[str], Path]:
    """family -> the artifact that the command makes of its tiny checkpoint."""
    root = tmp_path_factory.mktemp("artifacts")
    cache = make_cache(root / "cache", native_folder)

    def get(kind: str) -> Path:
        folder = root / kind
        if not folder.exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("GEMMA_AWQ_CACHE", str(cache))
                assert main(quantize_arguments(checkpoints(kind), folder, text_file)) == 0
        return folder

    return get


def quantize_arguments(checkpoint: Path, output: Path, text: Path, *more: str) -> list[str]:
    """A quick quantization of a tiny checkpoint: rows of 40 tokens, longer than the sliding window of 16.

    Without rows of the embedded text, which take longer to cut than such a checkpoint takes.
    """
    return [
        "quantize", str(checkpoint), "-o", str(output), "--calibration", str(text), "--group-size", "32",
        "--num-samples", "24", "--general-samples", "0", "--seq-len", "40", "--device", "cpu", *more,
    ]  # fmt: skip


def tiny_rows(checkpoint: Path, text: Path) -> Rows:
    return build_rows(
        find_recipe(str(text)), Prompter(checkpoint), 24, 40, seed=0, heldout_samples=heldout_samples(DEFAULT_QUALITY)
    )
