"""`quantize --adapter` makes the artifact that quantizing the merged model makes, and says what was merged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from gemma_awq_cli.cli.app import main
from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.fidelity.reference import find_original
from gemma_awq_cli.quantize.request import QuantizeRequest
from gemma_awq_cli.reports.stored_documents import read_quantization_report
from tests.adapters import edit_config, linears_of, merge_by_hand, write_adapter
from tests.conftest import quantize_arguments
from tests.tiny import snap_to_grid

Checkpoints = Callable[[str], Path]
Capture = pytest.CaptureFixture[str]
FAST = ("--quality", "fast")


@pytest.fixture
def adapter(checkpoints: Checkpoints, tmp_path: Path) -> Path:
    """Of Gemma 3's text model."""
    return write_adapter(tmp_path / "adapter", checkpoints("gemma3_text"), linears_of(checkpoints("gemma3_text")))


def words(captured: str) -> str:
    return " ".join(captured.split())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gemma3", "gemma4_text", "gemma4-experts"])
@pytest.mark.parametrize("calibration", ["text", "self"])
def test_the_artifact_is_that_of_the_merged_model(
    kind: str, calibration: str, checkpoints: Checkpoints, text_file: Path, tmp_path: Path
) -> None:
    """Bit for bit: the layers, the embedding, the towers, what the model samples for its own calibration."""
    base = checkpoints(kind)
    adapter = write_adapter(tmp_path / "adapter", base, linears_of(base))
    merged = merge_by_hand(tmp_path / "merged", base, adapter)
    more = (*FAST, *(("--calibration", "self", "--num-samples", "4") if calibration == "self" else ()))
    for source, name, given in ((base, "ours", ("--adapter", str(adapter))), (merged, "theirs", ())):
        assert main(quantize_arguments(source, tmp_path / name, text_file, *more, *given)) == 0
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.equal(theirs[name]), name
    reports = [read_quantization_report(tmp_path / name) for name in ("ours", "theirs")]
    for part in ("fidelity", "calibration", "layers", "artifact"):
        assert reports[0][part] == reports[1][part]


def test_the_report_names_the_adapter(
    adapter: Path, checkpoints: Checkpoints, text_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    (adapter / "README.md").write_text("---\nlicense: gemma\nbase_model: google/gemma-3-1b-it\n---\n")
    (adapter / "tokenizer.json").write_text("{}")
    edit_config(adapter, base_model_name_or_path="google/gemma-3-1b-it")
    out, base = tmp_path / "out", checkpoints("gemma3_text")
    assert main(quantize_arguments(base, out, text_file, *FAST, "--adapter", str(adapter))) == 0
    said = words(capsys.readouterr().err)
    assert f"was trained on google/gemma-3-1b-it, and is merged into {base}" in said
    assert "has tokenizer.json of its own" in said
    report = read_quantization_report(out)
    named = report["source"]["adapter"]
    assert {name: named[name] for name in ("model", "revision", "base_model", "card")} == {
        "model": str(adapter), "revision": None, "base_model": "google/gemma-3-1b-it",
        "card": {"license": "gemma", "base_model": "google/gemma-3-1b-it"},
    }  # fmt: skip
    assert named["sha256"] == report["fingerprint"]["adapter"]


def test_a_dry_run_writes_nothing(
    adapter: Path, checkpoints: Checkpoints, text_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    out, base = tmp_path / "out", checkpoints("gemma3_text")
    assert main(quantize_arguments(base, out, text_file, "--adapter", str(adapter), "--dry-run")) == 0
    captured = capsys.readouterr()
    assert f"{base} with {adapter} -> {out}" in words(captured.err)
    assert captured.out.strip() == str(out)
    assert not out.exists()
    (adapter / "adapter_model.safetensors").unlink()
    assert main(quantize_arguments(base, out, text_file, "--adapter", str(adapter), "--dry-run")) == 1
    assert "has no adapter_model.safetensors" in words(capsys.readouterr().err)


def test_another_adapter_does_not_continue_a_run(
    adapter: Path, checkpoints: Checkpoints, text_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    out, base = tmp_path / "out", checkpoints("gemma3_text")
    assert main(quantize_arguments(base, out, text_file, *FAST, "--adapter", str(adapter))) == 0
    assert main(quantize_arguments(base, out, text_file, *FAST, "--adapter", str(adapter), "--resume")) == 0
    assert "was complete already" in words(capsys.readouterr().err)
    other = Path(shutil.copytree(adapter, tmp_path / "other"))
    edit_config(other, lora_alpha=8)
    for given in (("--adapter", str(other)), ()):
        assert main(quantize_arguments(base, out, text_file, *FAST, *given, "--resume")) == 1
        assert "made under other conditions: model:" in (said := words(capsys.readouterr().err))
        assert "adapter:" in said


def report_of(source: dict[str, Any], identity: str) -> dict[str, Any]:
    return {"source": source, "fingerprint": {"model": identity}}


def test_the_original_is_the_merged_model(adapter: Path, checkpoints: Checkpoints, tmp_path: Path) -> None:
    from gemma_awq_cli.models.checkpoints.adapter import open_adapter
    from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint

    base = checkpoints("gemma3_text")
    identity = Checkpoint(base, open_adapter(adapter)).identity()
    named = {"model": str(adapter), "revision": None}
    report = report_of({"model": str(base), "revision": None, "adapter": named}, identity)

    def found(given: str | None) -> tuple[bool, bool]:
        original = find_original(report, given, "Name it.", lambda _: None)
        return original.is_source, original.checkpoint.adapter is not None

    assert found(None) == found(str(base)) == (True, True)
    assert found(str(merge_by_hand(tmp_path / "merged", base, adapter))) == (False, False)
    assert found(str(checkpoints("gemma"))) == (False, False)
    adapter.rename(tmp_path / "moved")
    assert found(str(base)) == (False, False)
    with pytest.raises(GemmaAwqError, match=r"adapter that was merged into the original, .* is not on this machine"):
        found(None)


def test_an_adapter_leaves_no_grid_to_keep(
    checkpoints: Checkpoints, text_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    base = Path(shutil.copytree(checkpoints("gemma3_text"), tmp_path / "base"))
    snap_to_grid(base)
    few = ["model.layers.0.self_attn.q_proj"]
    adapter = write_adapter(tmp_path / "adapter", base, few, target_modules=few)
    out = tmp_path / "out"
    assert main(quantize_arguments(base, out, text_file, "--dry-run", "--json", "--adapter", str(adapter))) == 0
    assert json.loads(capsys.readouterr().out)["keeps_grid"] is False
    assert main(quantize_arguments(base, out, text_file, "--qat", "keep", "--adapter", str(adapter))) == 2
    assert "--qat keep and --adapter contradict each other" in words(capsys.readouterr().err)


def test_a_revision_needs_an_adapter_of_the_hub(adapter: Path, checkpoints: Checkpoints, capsys: Capture) -> None:
    with pytest.raises(UsageError, match="--adapter-revision needs --adapter"):
        QuantizeRequest(adapter_revision="main")
    asked = ["quantize", str(checkpoints("gemma3_text")), "--adapter", str(adapter), "--adapter-revision", "x"]
    assert main(asked) == 2
    assert "only applies to a hub id" in words(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("given", "message", "hint"),
    [
        ("checkpoint", "it holds a whole model", "gemma-awq quantize"),
        ("file", "is a file", "not a file in it"),
        ("nothing/here/at-all", "is neither a folder nor a hub id", "--adapter"),
        ("outer", "adapter has one", "Give that folder"),
    ],
)
def test_what_is_no_adapter(
    given: str, message: str, hint: str, adapter: Path, checkpoints: Checkpoints, capsys: Capture
) -> None:
    places = {
        "checkpoint": checkpoints("gemma3_text"), "file": adapter / "adapter_config.json", "outer": adapter.parent,
    }  # fmt: skip
    asked = str(places.get(given, given))
    assert main(["quantize", str(checkpoints("gemma3_text")), "--adapter", asked]) == 1
    said = words(capsys.readouterr().err)
    assert message in said
    assert hint in said
