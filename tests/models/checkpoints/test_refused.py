"""Gemmas that this tool does not quantize: each with its reason, before anything is read or written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gemma_awq_cli.cli.app import main

REFUSED = {
    "t5gemma": "encoder-decoder",
    "t5gemma2": "encoder-decoder",
    "recurrent_gemma": "RG-LRU",
    "diffusion_gemma": "block diffusion",
    "embedding_gemma2": "encoder",
    "gemma4_assistant": "drafter",
    "gemma4_unified_assistant": "drafter",
    "paligemma": "needs images",
    "shieldgemma2": "classifies images",
}


def refusal(folder: Path, changes: dict[str, object], capsys: pytest.CaptureFixture[str]) -> str:
    """What `quantize` says of a checkpoint with these values in its config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}), encoding="utf-8")
    target = folder.parent / "artifact"
    assert main(["quantize", str(folder), "-o", str(target), "--device", "cpu"]) == 1
    assert [one.name for one in folder.parent.iterdir()] == [folder.name]
    return " ".join(capsys.readouterr().err.split())


@pytest.fixture
def folder(tmp_path: Path, checkpoints: Callable[[str], Path]) -> Path:
    return shutil.copytree(checkpoints("gemma3_text"), tmp_path / "checkpoint")


@pytest.mark.parametrize("model_type", REFUSED)
def test_other_kinds_of_gemma(model_type: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(folder, {"model_type": model_type}, capsys)
    assert f"model_type '{model_type}' is not supported" in said
    assert REFUSED[model_type] in said
    assert "hint:" in said


def test_an_encoder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(folder, {"use_bidirectional_attention": True}, capsys)
    assert "attends in both directions: it is an encoder" in said


@pytest.mark.parametrize("method", ["gemma", "compressed-tensors"])
def test_weights_that_are_packed_already(method: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(folder, {"quantization_config": {"quant_method": method, "bits": 4}}, capsys)
    assert f"is quantized already ({method}" in said
