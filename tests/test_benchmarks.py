"""The scripts under benchmarks/ still fit the package: their imports exist, and some of them run on tiny models."""

import ast
import importlib
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gemma_awq_cli.bench.drafts import TEXTS
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.quantize import information_layout

FOLDER = Path(__file__).parent.parent / "benchmarks"
Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize("script", sorted(FOLDER.rglob("*.py")), ids=lambda path: path.name)
def test_what_a_script_imports_of_the_package_exists(script: Path) -> None:
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gemma_awq_cli"):
            if node.module == "gemma_awq_cli.bench.lm_eval_model":
                pytest.importorskip("lm_eval")
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")


def run(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(FOLDER / name), run_name="__main__")


def test_rounding_to_nearest_writes_a_model(
    tmp_path: Path, checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    run("round_to_nearest.py", monkeypatch, checkpoints("gemma2"), tmp_path / "out", "--group-size", 32)
    assert capsys.readouterr().out.endswith(f"{tmp_path / 'out'}\n")
    assert Checkpoint(tmp_path / "out").quantization is not None


def test_kinds_of_text_measures_an_artifact(
    artifacts: Callable[[str], Path],
    checkpoints: Callable[[str], Path],
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    texts = ["--text", f"one={text_file}", "--text", f"other={text_file}", "--window", 40]
    run("kinds_of_text.py", monkeypatch, *texts, "--reference", checkpoints("gemma2"), artifacts("gemma2"))
    first, _, row = capsys.readouterr().out.splitlines()[-3:]
    assert first == "| | one | other | mean |"
    one, other, mean = (float(value) for value in row.split("|")[2:5])
    assert 0 < one == other == mean


@pytest.mark.slow
def test_row_feedback_compares_settings(
    checkpoints: Callable[[str], Path], text_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(information_layout, "ROWS", information_layout.ROWS)  # which the script changes
    more = ["--calibration", text_file, "--text", f"one={text_file}", "--window", 40, "--group-size", 32]
    more += ["--seq-len", 40, "--rows", 8, "--measured-rows", 6]
    settings = ["--setting", "none=0", "--setting", "all=0.5", "--setting", "nowhere=0.5:experts"]
    run("row_feedback.py", monkeypatch, checkpoints("gemma4_text"), *more, *settings)
    measuring, first, _, *rows = capsys.readouterr().out.splitlines()
    assert measuring.startswith("measuring: ")
    assert first == "| | one | mean |"
    none, everywhere, nowhere = (float(row.split("|")[2]) for row in rows)
    assert none == nowhere != everywhere


@pytest.mark.parametrize("draft", ["lookup", "itself"])
def test_drafted_tokens_compares_with_and_without(
    draft: str, tmp_path: Path, checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    texts = tmp_path / "texts.json"
    text = {"prompt": "A text that is short. ", "answer": "A text that is short. A text.", "stop": []}
    kinds = ["edit", "other"]
    texts.write_text(json.dumps([{**text, "kind": kind, "name": f"one {kind}"} for kind in kinds]), encoding="utf-8")
    folder = checkpoints("gemma3_text")
    named = ["--draft", folder] if draft == "itself" else []
    run("drafted_tokens.py", monkeypatch, folder, *named, "--texts", texts, "--tokens", 24, "--rounds", 1)
    lines = capsys.readouterr().out.splitlines()
    assert not any("DIFFER" in line for line in lines)
    assert [line.split()[1] for line in lines if "times as fast" in line] == kinds * 2
    (copied,) = [line.split() for line in lines if line.startswith("written") and "one edit" in line]
    assert int(copied[5]) > 3  # drafted
    assert int(copied[6]) > 3  # right


def test_the_texts_of_drafted_tokens_are_whole() -> None:
    texts = json.loads(TEXTS.read_text(encoding="utf-8"))
    assert len({text["name"] for text in texts}) == len(texts)
    assert {text["kind"] for text in texts} == {"summary", "edit", "code", "other"}
    assert all(text.keys() == {"kind", "name", "prompt", "answer", "stop"} for text in texts)


def test_decode_fidelity_compares_every_way_to_run(
    tmp_path: Path,
    checkpoints: Callable[[str], Path],
    artifacts: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    import torch

    (tmp_path / "text").write_text("Some words that are read one by one. " * 20)
    with torch.inference_mode():
        run(
            "decode_fidelity.py", monkeypatch, checkpoints("gemma"), artifacts("gemma"),
            "--text", tmp_path / "text", "--windows", 1, "--length", 12,
        )  # fmt: skip
    rows = [row for row in capsys.readouterr().out.splitlines() if row.startswith(("weights", "compiled", "torch"))]
    assert len(rows) == 1 + 3 + 3


@pytest.mark.slow
@pytest.mark.usefixtures("warm_python")
def test_interoperability_compares_readers_with_the_exact_weights(
    tmp_path: Path, artifacts: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    with pytest.raises(SystemExit) as ended:
        run("interoperability.py", monkeypatch, artifacts("gemma"), "--tokens", 40, "--work", tmp_path)
    out = capsys.readouterr().out
    lines = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")]
    rows = {cells[1]: float(cells[4]) for cells in lines if cells[4] != "KL max"}
    assert ended.value.code == 0, out
    assert rows.keys() >= {"dense, bfloat16", "dense, float16", "awq"}, out
    assert max(rows.values()) < 0.1  # nats: the largest of each reader


@pytest.mark.slow
@pytest.mark.thorough
def test_interoperability_names_what_a_reader_misses(
    tmp_path: Path, artifacts: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """A reader that fails is a row without figures, and the script ends with status 1."""
    with pytest.raises(SystemExit) as ended:
        run(
            "interoperability.py", monkeypatch, artifacts("gemma"), "--tokens", 40, "--work", tmp_path,
            "--only", "vllm", "--reader", f"vllm={sys.executable}",
        )  # fmt: skip
    out = capsys.readouterr().out
    assert ended.value.code == 1
    assert "| vLLM, CPU | awq, bfloat16 | - |" in out
    assert "No module named 'vllm'" in out
