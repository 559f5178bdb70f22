"""The tool in a Python that has what an installation without extras has, and nothing else."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import pytest

from gemma_awq_cli.system.extras import BRINGS, install_hint
from tests.base_install import ROOT, make_base_install, project
from tests.conftest import quantize_arguments

PACKAGE = ROOT / "gemma_awq_cli"
# Beside these, every module can be imported without any extra.
# triton comes with the torch of GPUs, or with autoawq
NEED_EXTRAS = ("gemma_awq_cli.serve.", "gemma_awq_cli.bench.lm_eval_model", "gemma_awq_cli.kernels.triton_")


class Run(Protocol):
    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]: ...


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base_install(tmp_path_factory.mktemp("base") / "packages")


@pytest.fixture
def python(packages: Path, tmp_path: Path) -> Run:
    """Runs that Python in an empty folder. -S: without the folder that all packages are in."""
    environment = {**os.environ, "PYTHONPATH": f"{packages}{os.pathsep}{ROOT}"}
    folder = tmp_path / "work"
    folder.mkdir()

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-S", *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=280
        )

    return run


def test_extras_bring_what_their_hints_name() -> None:
    extras = dict(project()["optional-dependencies"])
    (full,) = extras.pop("full")
    for of_the_clone in ("test", "examples", "docs"):
        extras.pop(of_the_clone)
    named = {name: tuple(line.partition(";")[0].strip() for line in lines) for name, lines in extras.items()}
    assert named == BRINGS
    inside = full.removeprefix("gemma-awq[").removesuffix("]").split(",")
    # the others are a model, need a compiler, or have no wheels for most systems; `grammar` is a part of `serve`
    assert set(extras) - set(inside) == {"demo", "llama-cpp", "vllm", "grammar"}
    assert set(BRINGS["grammar"]) <= set(BRINGS["serve"])


def test_the_oldest_versions_are_those_of_every_dependency() -> None:
    script = ROOT / ".ci" / "oldest_versions.py"
    if not script.is_file():
        pytest.skip("the source archive has no .ci")
    printed = subprocess.run([sys.executable, str(script)], check=True, capture_output=True, text=True).stdout.split()
    for line in project()["dependencies"]:
        name, bound = re.match(r"([\w-]+)>=([\d.]+)", line).groups()  # type: ignore[union-attr]
        assert f"{name}=={bound}" in printed


def test_hints_name_packages_and_not_this_tool() -> None:
    """Whoever holds the name `gemma-awq` on an index could run code where somebody follows such a hint."""
    assert install_hint("bnb") == 'Install the extra `bnb`: pip install "bitsandbytes>=0.50"'
    for path in [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.md"), ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = path.read_text(encoding="utf-8")
        assert "gemma-awq[" not in text.replace("`gemma-awq[extra]` would be looked up", ""), path


@pytest.mark.slow
def test_modules_need_no_extra(python: Run) -> None:
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted(PACKAGE.rglob("*.py"))
    ]
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "absent = {'awq', 'triton', 'datasets', 'pyarrow', 'pandas', 'accelerate', 'starlette', 'matplotlib'}\n"
        "assert not absent & set(sys.modules)\n"
    )
    done = python("-c", code, *(name for name in modules if not name.startswith(NEED_EXTRAS)))
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_quantize_run_and_bench(
    python: Run, tmp_path: Path, checkpoints: Callable[[str], Path], artifacts: Callable[[str], Path], text_file: Path
) -> None:
    """The artifact and the text are those of the full installation."""

    def run(*arguments: str) -> str:
        done = python("-m", "gemma_awq_cli", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    out = tmp_path / "out"
    run(*quantize_arguments(checkpoints("gemma"), out, text_file))
    name = "model.safetensors"
    assert (out / name).read_bytes() == (artifacts("gemma") / name).read_bytes()
    assert json.loads((out / "quantization_report.json").read_text())["verified"]["autoawq"] is None
    ask = ("run", "Hello", "--max-new-tokens", "8", "--temperature", "0", "--device", "cpu", "--json", "-m")
    with_all = subprocess.run(
        [sys.executable, "-m", "gemma_awq_cli", *ask, str(artifacts("gemma"))], check=True, stdout=subprocess.PIPE
    ).stdout
    assert json.loads(run(*ask, str(out)))["text"] == json.loads(with_all)["text"]
    fidelity = ("--fidelity", "--window", "16", "--windows", "1", "--text", str(text_file), "--device", "cpu", "--json")
    assert json.loads(run("bench", str(out), *fidelity))["models"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "needed", "extra"),
    [
        pytest.param(
            "quantize MODEL -o out --seq-len 64 --calibration wikitext", "hub dataset", "datasets",
            marks=pytest.mark.thorough,
        ),
        pytest.param(
            "quantize MODEL -o out --seq-len 64 --calibration rows.parquet", "pyarrow", "datasets",
            marks=pytest.mark.thorough,
        ),
        ("bench ARTIFACT --fidelity --text wikitext", "hub dataset", "datasets"),
        ("bench ARTIFACT --tasks arc_easy", "lm-evaluation-harness", "eval"),
        ("bench ARTIFACT --report page.html", "matplotlib", "report"),
        pytest.param("run Hello -m MODEL --quantization nf4", "bitsandbytes", "bnb", marks=pytest.mark.thorough),
        ("run Hello -m ARTIFACT --engine vllm", "vLLM", "vllm"),
        ("run Hello -m ARTIFACT --json-schema schema.json", "llguidance", "grammar"),
        ("serve ARTIFACT", "starlette", "serve"),
        ("export ARTIFACT --to gguf -o out.gguf", "Python library", "gguf"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named_with_its_extra(
    python: Run,
    checkpoints: Callable[[str], Path],
    artifacts: Callable[[str], Path],
    tmp_path: Path,
    arguments: str,
    needed: str,
    extra: str,
) -> None:
    (tmp_path / "work" / "rows.parquet").write_bytes(b"PAR1")
    (tmp_path / "work" / "schema.json").write_text('{"type": "object"}')
    places = {"MODEL": str(checkpoints("gemma3")), "ARTIFACT": str(artifacts("gemma3"))}
    done = python("-m", "gemma_awq_cli", *(places.get(argument, argument) for argument in arguments.split()))
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    error, hint = done.stderr[done.stderr.index("error: ") :].splitlines()[:2]
    assert needed in error
    assert hint.startswith(f"hint: {install_hint(extra)}")
