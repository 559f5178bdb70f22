"""The rules that keep the project readable: imports run one way, one file prints, and help is instant."""

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gemma_awq_cli

PACKAGE = Path(gemma_awq_cli.__file__).parent
# A room may import from itself and from the rooms before it.
ORDER = [
    "errors",
    "reading",
    "interruption",
    "saving",
    "families",
    "awq",
    "kernels",
    "models",
    "verbs",
    "commands",
    "cli",
]
VERBS = {
    "artifact",
    "batching",
    "bench_document",
    "bench_entries",
    "bench_process",
    "bench_report",
    "bench_worker",
    "benchmarking",
    "calibration",
    "document_files",
    "document_folder",
    "document_forms",
    "document_reading",
    "hub_dataset",
    "recipes",
    "chatting",
    "generation",
    "harness_model",
    "layer_quantizing",
    "licensing",
    "local_paths",
    "llama_cpp_model",
    "local_engine",
    "markup",
    "measuring_fidelity",
    "measuring_speed",
    "measuring_tasks",
    "model_card",
    "observing",
    "outgoing",
    "planning",
    "prompt_file",
    "publishing",
    "quantizing",
    "remeasuring",
    "running_fidelity",
    "sampling",
    "scoring",
    "secret_search",
    "secret_forms",
    "schema_check",
    "self_sampling",
    "stored_documents",
    "source_metadata",
    "side_files",
    "task_suites",
    "text_stream",
    "vllm_engine",
    "thresholds",
}
ANYWHERE = {"__init__", "errors"}
COMMAND_SIDE = {"output", "options", "streams", "terminal"}  # for commands and cli only


def room_of(module: str) -> str:
    """gemma_awq_cli.models.forward.layerwise -> models."""
    parts = module.split(".")[1:]
    first = parts[0] if parts else "__init__"
    return "verbs" if first in VERBS else first


def imports() -> list[tuple[str, str]]:
    """(importing module, imported module) inside the package, lazy imports included."""
    pairs = []
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE.parent).with_suffix("")
        module = ".".join(relative.parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = (
                    [node.module] if node.module != "gemma_awq_cli" else [f"gemma_awq_cli.{a.name}" for a in node.names]
                )
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            pairs += [(module, name) for name in names if name.startswith("gemma_awq_cli")]
    return pairs


def test_imports_run_one_way() -> None:
    pairs = imports()
    assert len(pairs) > 50
    for importer, imported in pairs:
        importing, used = room_of(importer), room_of(imported)
        if used in ANYWHERE or importing in ("__main__", used) or imported == "gemma_awq_cli.__version__":
            continue
        if used in COMMAND_SIDE:
            assert importing in ("commands", "cli", *COMMAND_SIDE), f"{importer} imports {imported}"
            continue
        if importing in COMMAND_SIDE:
            assert used == "reading", f"{importer} imports {imported}"
            continue
        assert ORDER.index(used) < ORDER.index(importing), f"{importer} imports {imported}"


def test_the_maths_chooses_no_device_and_opens_no_file() -> None:
    for path in (PACKAGE / "awq").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        for word in ("cuda", "open(", "pathlib", "transformers"):
            assert word not in text, f"{path.name} mentions {word}"


def test_only_output_prints() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.name in ("output.py", "streams.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "print", f"{path.name}:{node.lineno}"
            if isinstance(node, ast.Attribute):
                assert node.attr not in ("stdout", "stderr"), f"{path.name}:{node.lineno}"


def test_no_file_grows_beyond_what_fits_in_a_head() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\nfrom gemma_awq_cli.cli.app import main\n"
        "for command in ([], ['quantize'], ['run'], ['bench'], ['push']): assert main([*command, '--help']) == 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'awq', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_autoawq_stays_behind_its_boundary() -> None:
    """It is archived and may be absent: one file loads a piece of it, and nothing imports its package."""
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name == "awq" or name.startswith("awq.") for name in names), path
            if isinstance(node, ast.Constant) and node.value in ("awq", "autoawq") and "find_spec" in ast.unparse(tree):
                assert path.name == "autoawq.py", path


def test_everything_works_without_autoawq(monkeypatch: pytest.MonkeyPatch) -> None:
    from gemma_awq_cli.awq.packing import PackedWeight
    from gemma_awq_cli.kernels import autoawq

    def absent(_: str) -> str:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert autoawq.autoawq_version() is None
    nothing = torch.zeros(1)
    assert autoawq.dequantize_with_autoawq(PackedWeight(nothing, nothing, nothing), 128) is None
