"""A wheel that carries compiled kernels: they run without a compiler, and compute what those compiled here compute."""

import os
import platform
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gemma_awq_cli.kernels.native import library as native_library
from gemma_awq_cli.kernels.native import prebuilt
from gemma_awq_cli.kernels.native.library import Library, Unavailable
from gemma_awq_cli.models.forward.loading import open_model
from tests.models.forward.test_torch_decoder import CAPACITY, apart, random_turns, read_by

ROOT = Path(__file__).parents[2]
# what processor.c names -> what /proc/cpuinfo calls the rarest of its instructions
FLAGS = {"avx512_vnni": "avx512_vnni", "avx_vnni": "avx_vnni", "avx2": "avx2"}
NAMES = ("avx2", "avx_vnni", "avx512_vnni")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel for this machine's system, compiled by its own compiler."""
    compiler = native_library.find_compiler()
    if compiler is None or (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip("needs a C++ compiler on Linux, x86-64")
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], cwd=ROOT, check=True,
        env={**os.environ, "GEMMA_AWQ_WHEEL": "linux-x86_64", "CXX": " ".join(compiler)}, timeout=250,
    )  # fmt: skip
    (wheel,) = folder.glob("*-py3-none-linux_x86_64.whl")
    zipfile.ZipFile(wheel).extractall(folder / "installed")
    return folder / "installed"


@pytest.fixture
def shipped(installed: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of its libraries, with CXX unset."""
    monkeypatch.delenv("CXX", raising=False)
    return installed / prebuilt.FOLDER.relative_to(ROOT)


@pytest.fixture(scope="module")
def compiled_here(native_folder: Path) -> Library:
    """The library that is compiled at first use."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_library, "load_prebuilt", lambda: None)
        native_library.load.cache_clear()
        loaded = native_library.load(native_folder)
    if isinstance(loaded, Unavailable):
        pytest.skip(loaded.reason)
    return loaded


def runs_here(shipped: Path) -> list[str]:
    return [path.stem for path in prebuilt.runnable(shipped)]


@pytest.mark.slow
@pytest.mark.thorough
def test_the_processor_runs_what_the_system_says_it_can(shipped: Path) -> None:
    flags = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text(encoding="utf-8")))
    assert runs_here(shipped) == [name for name, flag in FLAGS.items() if flag in flags]


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["gemma3", "gemma3n"])
def test_every_library_computes_what_the_compiled_one_does(
    kind: str, name: str, shipped: Path, compiled_here: Library, artifacts: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if name not in runs_here(shipped):
        pytest.skip(f"this processor has no {name}")
    library = Library(shipped / f"{name}.so")
    assert library.sources == native_library.sources_hash()
    assert re.sub("[- ]", "", library.instructions.lower()) == name.replace("_", "")
    logits = []
    for used in (compiled_here, library):
        monkeypatch.setattr(native_library, "load", lambda folder, used=used: used)
        opened = open_model(artifacts(kind), torch.device("cpu"))
        assert ("prebuilt" in opened.kernel_report()[0]) == (used is library)
        logits.append(read_by(opened.session(3, CAPACITY), random_turns()))
    # as in test_compiled_decoder: what remains is the order of summation, which moves an activation over the edge
    # between two of its eight-bit steps now and then
    assert apart(*logits).median() < 1e-4
    assert apart(*logits).max() < 0.03
    assert torch.equal(logits[0].argmax(-1), logits[1].argmax(-1))


@pytest.mark.slow
@pytest.mark.thorough
def test_without_a_compiler_the_command_runs_the_wheels_kernels(
    shipped: Path, installed: Path, artifacts: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    paths = {"PATH": str(tmp_path / "bin"), "PYTHONPATH": str(installed), "GEMMA_AWQ_CACHE": str(tmp_path / "cache")}
    model = str(artifacts("gemma3"))
    done = subprocess.run(
        [sys.executable, "-m", "gemma_awq_cli", "run", "--verbose", "-m", model, "--max-new-tokens", "3", "Hi"],
        cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False, env={**os.environ, **paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "prebuilt" in done.stderr
    assert not list((tmp_path / "cache").rglob("*.so"))


@pytest.mark.slow
@pytest.mark.thorough
def test_the_fastest_one_is_loaded_unless_a_compiler_is_asked_for(
    shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fastest = native_library.load_prebuilt(shipped)
    assert fastest is not None
    assert fastest.instructions == Library(shipped / f"{runs_here(shipped)[0]}.so").instructions
    monkeypatch.setattr(native_library, "load_prebuilt", lambda: fastest)
    native_library.load.cache_clear()
    assert native_library.load(tmp_path) is fastest
    native_library.load.cache_clear()
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    assert isinstance(native_library.load(tmp_path), Unavailable)


@pytest.mark.slow
@pytest.mark.thorough
def test_a_library_of_other_sources_is_not_loaded(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_library, "sources_hash", lambda: "0" * 64)
    assert native_library.load_prebuilt(shipped) is None


def test_an_installation_without_them_has_none(tmp_path: Path) -> None:
    assert native_library.load_prebuilt(tmp_path) is None


def test_the_build_makes_the_libraries_that_the_processor_is_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hatchling")
    monkeypatch.syspath_prepend(ROOT)
    import hatch_build

    built = {name for platform in hatch_build.PLATFORMS.values() for name in platform.libraries}
    source = (native_library.SOURCES / "processor.c").read_text(encoding="utf-8")
    answers = re.findall(r'"([a-z0-9_ ]+)"', " ".join(re.findall(r"return .*;", source)))
    assert {name for answer in answers for name in answer.split()} == built
    assert set(hatch_build.GCC_X86) == set(hatch_build.X86)
