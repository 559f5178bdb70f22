"""Checkpoints of quantization-aware training: their grid is found, said, and kept bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gemma_awq_cli.awq.grid import dequantize
from gemma_awq_cli.awq.packing import PackedWeight, unpack_weight
from gemma_awq_cli.cli.app import main
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward.layerwise import TextStack
from gemma_awq_cli.quantize.kept_grid import sample_grids
from gemma_awq_cli.reports.stored_documents import read_quantization_report
from tests.conftest import FAMILIES, quantize_arguments
from tests.tiny import edit_weights, make_checkpoint, snap_to_grid

Capture = pytest.CaptureFixture[str]
SECTION = {"bits": 4, "type": "q4_0"}  # of the training: it names no quant_method


@pytest.fixture(scope="session")
def qat_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """family -> its tiny checkpoint with all linears on a grid, and a section on the training in its config."""
    root = tmp_path_factory.mktemp("qat")

    def get(kind: str) -> Path:
        folder = root / kind
        if not folder.exists():
            make_checkpoint(folder, kind, sharded=kind == "gemma2")
            snap_to_grid(folder)
            config = json.loads((folder / "config.json").read_text())
            config["quantization_config"] = SECTION
            if "text_config" in config:
                config["text_config"]["quantization_config"] = SECTION
            (folder / "config.json").write_text(json.dumps(config))
        return folder

    return get


def default_size(arguments: list[str]) -> list[str]:
    """The arguments without --group-size."""
    place = arguments.index("--group-size")
    return arguments[:place] + arguments[place + 2 :]


def quantize(checkpoint: Path, output: Path, text: Path, *more: str) -> dict[str, Any]:
    assert main(default_size(quantize_arguments(checkpoint, output, text, *more))) == 0
    return read_quantization_report(output)


def packed_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The linears of an artifact, dequantized in float32."""
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    found = {}
    for name in [name for name in tensors if name.endswith(".qweight")]:
        base = name.removesuffix(".qweight")
        packed = PackedWeight(*(tensors[f"{base}.{kind}"] for kind in PackedWeight._fields))
        found[f"{base}.weight"] = dequantize(*unpack_weight(packed))
    return found


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_weight_comes_back_bit_for_bit(
    kind: str, qat_checkpoints: Callable[[str], Path], text_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    source, folder = qat_checkpoints(kind), tmp_path / "artifact"
    report = quantize(source, folder, text_file)
    assert "QAT checkpoint: 100 % of the weights lie on a 4-bit grid in groups of 32." in capsys.readouterr().err
    originals = {name: t for file in source.glob("*.safetensors") for name, t in load_file(file).items()}
    stored, checkpoint = packed_weights(folder), Checkpoint(source)
    places = {
        checkpoint.key(f"model.layers.{i}.{name}.weight"): (checkpoint.key(f"model.layers.{i}.{place.tensor}"), place)
        for i, layout in enumerate(checkpoint.shape.layouts)
        for name, place in layout.places().items()
    }
    assert stored.keys() == places.keys()
    for name, weight in stored.items():
        tensor, place = places[name]
        assert torch.equal(weight.to(torch.bfloat16), originals[tensor][place.part])
    others = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    for name, tensor in others.items():
        if name.endswith("norm.weight"):  # nothing is folded
            assert torch.equal(tensor, originals[name])
    qat = report["qat"]
    assert qat["groups"] == qat["on_grid"] == qat["exact"] == sum(w.numel() // 32 for w in stored.values())
    assert report["artifact"]["group_size"] == report["arguments"]["group_size"] == 32
    assert report["calibration"]["rows"] == 0
    assert {group["method"] for layer in report["layers"] for group in layer} == {"kept grid"}
    assert all(group["error"] == 0 < group["rtn_error"] for layer in report["layers"] for group in layer)
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "awq"
    assert config["quantization_config"].keys().isdisjoint(SECTION.keys() - {"bits"})
    assert "quantization_config" not in config.get("text_config", {})


def test_the_default_quantization_throws_the_training_away(
    qat_checkpoints: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    kept = quantize(qat_checkpoints("gemma3_text"), tmp_path / "kept", text_file)
    again = main(quantize_arguments(qat_checkpoints("gemma3_text"), tmp_path / "again", text_file, "--qat", "ignore"))
    assert again == 0
    ignored = read_quantization_report(tmp_path / "again")
    assert "qat" not in ignored
    assert ignored["arguments"]["qat"] == "ignore"
    assert ignored["calibration"]["rows"] > 0
    assert kept["fidelity"]["kl"] < ignored["fidelity"]["kl"] / 5


@torch.inference_mode()
def test_the_reported_kl_is_that_of_rounding_to_bfloat16(
    qat_checkpoints: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    from tests.conftest import tiny_rows
    from tests.models.forward.test_loading import dequantized

    source, folder = qat_checkpoints("gemma3_text"), tmp_path / "artifact"
    report = quantize(source, folder, text_file)
    rows = tiny_rows(source, text_file)
    exact, rounded = dequantized(folder), dequantized(folder)
    for name, parameter in rounded.named_parameters():
        if name.endswith("proj.weight"):
            parameter.copy_(parameter.to(torch.bfloat16))
    unrounded, reference = (m(input_ids=rows.heldout).logits[:, :-1].log_softmax(-1) for m in (exact, rounded))
    kl = float((reference.exp() * (reference - unrounded)).sum(-1).mean())
    assert report["fidelity"]["kl"] == pytest.approx(kl, rel=0.1)


@pytest.mark.parametrize("kind", FAMILIES)
def test_no_other_checkpoint_is_taken_for_one(kind: str, checkpoints: Callable[[str], Path]) -> None:
    sample = sample_grids(Checkpoint(checkpoints(kind)), torch.bfloat16)
    assert sample.groups > 200
    assert sample.on_grid == 0


def test_another_group_size_is_an_error_that_names_the_way_out(
    qat_checkpoints: Callable[[str], Path], text_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    arguments = default_size(quantize_arguments(qat_checkpoints("gemma"), tmp_path / "out", text_file))
    assert main([*arguments, "--group-size", "64"]) == 2
    error = capsys.readouterr().err
    assert "--group-size 64" in error
    assert "--qat ignore" in error
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "--group-size", "32", "--dry-run"]) == 0
    assert main([*arguments, "--group-size", "32", "--qat", "ignore"]) == 0


def test_keeping_a_grid_that_is_not_there_is_an_error(
    checkpoints: Callable[[str], Path], text_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    arguments = quantize_arguments(checkpoints("gemma"), tmp_path / "out", text_file, "--qat", "keep")
    assert main(arguments) == 2
    assert "no grid to keep: 0.00 % of the weights" in capsys.readouterr().err


def test_the_dry_run_tells_what_will_happen(
    qat_checkpoints: Callable[[str], Path], text_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    arguments = default_size(quantize_arguments(qat_checkpoints("gemma2"), tmp_path / "out", text_file))
    assert main([*arguments, "--dry-run", "--json"]) == 0
    captured = capsys.readouterr()
    plan = json.loads(captured.out)
    assert plan["keeps_grid"] is True
    assert plan["group_size"] == 32
    assert "QAT checkpoint" in captured.err
    assert main([*arguments, "--dry-run", "--json", "--qat", "ignore", "--group-size", "32"]) == 0
    ignored = json.loads(capsys.readouterr().out)
    assert ignored["keeps_grid"] is False
    assert ignored["estimated_seconds"] >= plan["estimated_seconds"]


def test_groups_off_the_grid_are_counted_and_the_others_kept(
    qat_checkpoints: Callable[[str], Path], text_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    """One linear of 21 was not trained: --qat keep keeps the rest, and the default says what it would lose."""
    import shutil

    source = Path(shutil.copytree(qat_checkpoints("gemma3_text"), tmp_path / "source"))
    name = "model.layers.1.self_attn.k_proj.weight"
    noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * 0.1
    edit_weights(source, lambda tensors: tensors.update({name: noise.to(torch.bfloat16)}))
    report = quantize(source, tmp_path / "kept", text_file, "--qat", "keep")
    groups = {group["name"]: group for group in report["layers"][1]}
    qkv = groups["qkv"]["kept"]
    assert qkv["groups"] - qkv["on_grid"] == noise.numel() // 32
    assert 0 < groups["qkv"]["error"] < groups["qkv"]["rtn_error"]
    assert report["qat"]["groups"] - report["qat"]["exact"] == noise.numel() // 32
    originals = load_file(source / "model.safetensors")
    for linear, weight in packed_weights(tmp_path / "kept").items():
        assert torch.equal(weight.to(torch.bfloat16), originals[linear]) == (linear != name)
    capsys.readouterr()
    quantize(source, tmp_path / "again", text_file, "--group-size", "32")
    assert "--qat keep keeps the grid" in capsys.readouterr().err
    assert "qat" not in read_quantization_report(tmp_path / "again")


def test_an_interrupted_run_resumes_to_the_same_bytes_and_counts(
    qat_checkpoints: Callable[[str], Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gemma_awq_cli.quantize import pipeline

    whole = quantize(qat_checkpoints("gemma2"), tmp_path / "whole", text_file)
    process = pipeline.process_layer

    def stop_at_the_last(*arguments: Any) -> Any:
        if arguments[5] == 2:  # the layer's index
            raise KeyboardInterrupt
        return process(*arguments)

    arguments = default_size(quantize_arguments(qat_checkpoints("gemma2"), tmp_path / "out", text_file))
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "process_layer", stop_at_the_last)
        assert main(arguments) == 130
    assert main([*arguments, "--resume", "--qat", "ignore", "--group-size", "32"]) == 1  # another mode is another model
    assert main([*arguments, "--resume"]) == 0
    resumed = read_quantization_report(tmp_path / "out")
    assert resumed["qat"] == whole["qat"]
    assert resumed["layers"] == whole["layers"]
    for path in sorted((tmp_path / "whole").iterdir()):
        if path.name != "quantization_report.json":
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_the_artifact_can_be_pushed(
    qat_checkpoints: Callable[[str], Path], text_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    quantize(qat_checkpoints("gemma3_text"), tmp_path / "out", text_file)
    capsys.readouterr()
    arguments = ["push", "me/tiny", str(tmp_path / "out"), "--base-model", "google/tiny-qat", "--license", "gemma"]
    assert main([*arguments, "--dry-run", "--deep", "--device", "cpu"]) == 0
    assert "Nothing was lost" in "".join(capsys.readouterr())


def test_the_16_bit_checkpoint_of_a_qat_model_runs(qat_checkpoints: Callable[[str], Path], capsys: Capture) -> None:
    """Its quantization section names no method, and its weights are 16-bit."""
    checkpoint = Checkpoint(qat_checkpoints("gemma3"))
    assert checkpoint.quantization is None
    assert "quantization_config" not in checkpoint.raw_config
    TextStack(checkpoint, torch.device("cpu"))
    assert main(["run", "Hello", "-m", str(qat_checkpoints("gemma3_text")), "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out
