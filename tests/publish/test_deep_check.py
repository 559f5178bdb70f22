"""What is checked before anything is sent: a damaged artifact is not pushed, and --deep finds what files alone hide."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gemma_awq_cli.cli.app import main
from tests.tiny import edit_weights, make_checkpoint

Capture = pytest.CaptureFixture[str]
SAID = ("--base-model", "org/tiny", "--license", "gemma", "--device", "cpu", "--dry-run")


@pytest.fixture
def artifact(artifacts: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifacts("gemma"), tmp_path / "artifact"))


def refused(folder: Path, capsys: Capture, *more: str) -> str:
    """What is said of an artifact that may not be pushed."""
    capsys.readouterr()
    assert main(["push", "me/x", str(folder), *SAID, *more]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def edit_json(path: Path, change: Callable[[dict], object]) -> None:  # type: ignore[type-arg]
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize("kind", ["gemma2", "gemma3"])  # soft-caps and shards; keys below a prefix
def test_the_divergence_is_measured_again(kind: str, artifacts: Callable[[str], Path], capsys: Capture) -> None:
    folder = artifacts(kind)
    capsys.readouterr()
    assert main(["push", "me/x", str(folder), *SAID, "--deep"]) == 0
    captured = capsys.readouterr()
    kl = json.loads((folder / "quantization_report.json").read_text())["fidelity"]["kl"]
    assert f"(the report tells {kl:.4f})" in captured.err
    again = float(captured.err.split("measured again: ")[1].split()[0])
    assert again == pytest.approx(kl, rel=0.002, abs=1e-4)
    assert "It continues" in captured.err


def test_a_weight_that_was_changed_since_is_found_by_measuring(artifact: Path, capsys: Capture) -> None:
    edit_weights(artifact, lambda t: t["model.layers.1.mlp.down_proj.scales"].mul_(1.5))
    assert main(["push", "me/x", str(artifact), *SAID]) == 0  # every file is well formed
    assert "The report tells a KL divergence of" in refused(artifact, capsys, "--deep")


def test_the_original_must_be_there_and_be_the_original(
    artifact: Path, checkpoints: Callable[[str], Path], tmp_path: Path, capsys: Capture
) -> None:
    def gone(report: dict) -> None:  # type: ignore[type-arg]
        report["source"]["model"] = "/no/such/checkpoint"

    edit_json(artifact / "quantization_report.json", gone)
    said = refused(artifact, capsys, "--deep")
    assert "The 16-bit original, /no/such/checkpoint, is not on this machine" in said
    assert "--source" in said
    assert main(["push", "me/x", str(artifact), *SAID, "--deep", "--source", str(checkpoints("gemma"))]) == 0
    other = make_checkpoint(tmp_path / "other", "gemma", seed=5)
    assert "is not the checkpoint" in refused(artifact, capsys, "--deep", "--source", str(other))
    assert main(["push", "me/x", str(artifact), *SAID, "--source", "x"]) == 2


def test_a_text_that_changed_since_is_noticed(artifact: Path, tmp_path: Path, capsys: Capture) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Another text. " * 500)
    edit_json(artifact / "quantization_report.json", lambda r: r["arguments"].update(calibration=str(text)))
    assert "is not what it was when this artifact was measured" in refused(artifact, capsys, "--deep")


def _drop(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop("model.layers.2.mlp.up_proj.qzeros"), "lacks the tensor model.layers.2.mlp.up_proj.qzeros"),
        (_drop("model.norm.weight"), "lacks the tensor model.norm.weight"),
        (lambda t: t["model.layers.0.mlp.up_proj.scales"].fill_(float("inf")), "NaN or infinite"),
        (lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}), "1 tensors that this model"),
        (lambda t: t.update({"x": torch.zeros(2)}), "1 tensors that this model does not have: x"),
        (
            lambda t: t.update(
                {"model.layers.0.mlp.up_proj.scales": t["model.layers.0.mlp.up_proj.scales"].bfloat16()}
            ),
            "is stored as torch.bfloat16",
        ),
        (lambda t: t.update({"model.norm.weight": t["model.norm.weight"].float()}), "its report tells of"),
    ],
)
def test_weights_that_are_not_whole(
    change: Callable[[dict[str, Tensor]], object], message: str, artifact: Path, capsys: Capture
) -> None:
    edit_weights(artifact, change)
    assert message in refused(artifact, capsys)


def test_folders_that_are_no_artifact(artifact: Path, tmp_path: Path, capsys: Capture) -> None:
    assert "is not a folder" in refused(tmp_path / "nothing", capsys)
    assert "is not an artifact of this tool" in refused(tmp_path, capsys)
    (artifact / "tokenizer.json").write_text("{}")
    assert "tokenizer" in refused(artifact, capsys)


def test_a_report_of_something_else(artifact: Path, capsys: Capture) -> None:
    report = artifact / "quantization_report.json"
    whole = report.read_text()
    edit_json(report, lambda r: r["source"].update(model_type="gemma2"))
    assert "tells model_type gemma2, but config.json says gemma" in refused(artifact, capsys)
    report.write_text(whole)
    edit_json(report, lambda r: r["fidelity"].pop("kl"))
    assert "does not tell fidelity.kl" in refused(artifact, capsys)
    report.write_text("{")
    assert "is not valid JSON" in refused(artifact, capsys)


def test_an_index_that_is_not_complete(
    checkpoints: Callable[[str], Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    from gemma_awq_cli.models.checkpoints.writing import TensorWriter
    from tests.conftest import quantize_arguments

    monkeypatch.setattr(TensorWriter.__init__, "__defaults__", (50_000, False))
    folder = tmp_path / "sharded"
    assert main(quantize_arguments(checkpoints("gemma"), folder, text_file)) == 0
    assert main(["push", "me/x", str(folder), *SAID]) == 0
    index = folder / "model.safetensors.index.json"
    edit_json(index, lambda i: i["weight_map"].pop("model.norm.weight"))
    assert "says nothing of model.norm.weight" in refused(folder, capsys)


def test_a_chat_template_that_cannot_be_used(artifact: Path, capsys: Capture) -> None:
    (artifact / "chat_template.jinja").write_text("{% for m in messages %}")
    said = refused(artifact, capsys)
    assert "chat_template.jinja, line 1) cannot be read: Unexpected end of template." in said
