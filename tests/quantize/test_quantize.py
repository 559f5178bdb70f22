"""`quantize` on tiny Gemmas of every family: the artifact, its report, and its promises."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gemma_awq_cli.awq.grid import dequantize
from gemma_awq_cli.awq.packing import PackedWeight, unpack_weight
from gemma_awq_cli.cli.app import main
from gemma_awq_cli.models.checkpoints import weight_files
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward.layerwise import TextStack
from gemma_awq_cli.system.arrays import as_tensor
from tests.conftest import FAMILIES, quantize_arguments, tiny_rows
from tests.tiny import make_checkpoint

Capture = pytest.CaptureFixture[str]


def report_of(folder: Path) -> dict:  # type: ignore[type-arg]
    return json.loads((folder / "quantization_report.json").read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", FAMILIES)
def test_no_group_is_worse_than_round_to_nearest_and_outliers_gain(kind: str, artifacts: Callable[[str], Path]) -> None:
    layers = report_of(artifacts(kind))["layers"]
    layouts = Checkpoint(artifacts(kind)).shape.layouts
    for layer, layout in zip(layers, layouts, strict=True):
        experts = [layout.experts.gate_up, layout.experts.down] if layout.experts else []
        known_groups = [(one, list(one.linears)) for one in layout.groups]
        known_groups += [(one, [f"experts.*.{name}" for name in one.linears]) for one in experts]
        for group, (known, linears) in zip(layer, known_groups, strict=True):
            assert (group["name"], group["linears"]) == (known.name, linears)
            assert group["error"] <= group["rtn_error"]
            # every group's input has planted outlier channels (large gains, large rows of v and up)
            assert group["error"] < 0.9 * group["rtn_error"]
            method = "compensation" if known.fold == "none" else "scale+compensation"
            assert group["method"].removeprefix("descended ") == method


@pytest.mark.parametrize("kind", FAMILIES)
@torch.inference_mode()
def test_the_report_tells_the_measured_truth(
    kind: str, artifacts: Callable[[str], Path], checkpoints: Callable[[str], Path], text_file: Path
) -> None:
    """KL, perplexities and top-1, measured again on the stored artifact by transformers' whole-model forward."""
    from tests.models.forward.test_loading import dequantized

    rows = tiny_rows(checkpoints(kind), text_file)
    fidelity = report_of(artifacts(kind))["fidelity"]
    assert fidelity["heldout_tokens"] == rows.heldout[:, 1:].numel()
    quantized = dequantized(artifacts(kind))(input_ids=rows.heldout).logits[:, :-1].log_softmax(-1)
    original = _original(checkpoints(kind))(input_ids=rows.heldout).logits[:, :-1].log_softmax(-1)
    kl = float((original.exp() * (original - quantized)).sum(-1).mean())
    target = rows.heldout[:, 1:, None]
    assert fidelity["kl"] == pytest.approx(kl, rel=0.02)
    assert fidelity["perplexity_4bit"] == pytest.approx(float((-quantized.gather(-1, target)).mean().exp()), rel=0.01)
    assert fidelity["perplexity_16bit"] == pytest.approx(float((-original.gather(-1, target)).mean().exp()), rel=0.01)
    assert fidelity["top1_agreement"] == pytest.approx(
        float((original.argmax(-1) == quantized.argmax(-1)).float().mean()), abs=0.02
    )


def _original(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    checkpoint = Checkpoint(folder)
    stack = TextStack(checkpoint, torch.device("cpu"))
    model = AutoModelForCausalLM.from_config(checkpoint.text_config, dtype=torch.float32)
    model.load_state_dict({n: t.float() for n, t in checkpoint.read(stack.shapes).items()}, strict=False)
    model.tie_weights()
    return model.eval()  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_artifacts_files(kind: str, artifacts: Callable[[str], Path], checkpoints: Callable[[str], Path]) -> None:
    folder = artifacts(kind)
    config = json.loads((folder / "config.json").read_text())
    quantization = config["quantization_config"]
    assert quantization["quant_method"] == "awq"
    assert quantization["version"] == "gemm"
    assert quantization["zero_point"] is True
    assert (quantization["bits"], quantization["group_size"]) == (4, 32)
    source, artifact = Checkpoint(checkpoints(kind)), Checkpoint(folder)
    layouts = source.shape.layouts
    linears = {source.key(f"model.layers.{i}.{name}") for i, layout in enumerate(layouts) for name in layout.unpacked()}
    assert not linears & set(artifact.tensors)
    packed = {
        f"model.layers.{i}.{name}": one for i, layout in enumerate(layouts) for name, one in layout.packed().items()
    }
    for name, linear in packed.items():
        base = source.key(f"{name}.weight").removesuffix(".weight")
        out_features, in_features = linear.outputs, linear.inputs
        assert artifact.tensors[f"{base}.qweight"].shape == (in_features, out_features // 8)
        assert artifact.tensors[f"{base}.qzeros"].shape == (in_features // 32, out_features // 8)
        assert artifact.tensors[f"{base}.scales"].shape == (in_features // 32, out_features)
        assert artifact.tensors[f"{base}.scales"].dtype == torch.float16
    # all else keeps its key; the head stays tied, written once
    assert {k for k in source.tensors if k not in linears} <= set(artifact.tensors)
    assert not any(key.endswith("lm_head.weight") for key in artifact.tensors)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (checkpoints(kind) / name).read_bytes()


def test_a_multimodal_tower_is_copied_as_it_is(
    artifacts: Callable[[str], Path], checkpoints: Callable[[str], Path]
) -> None:
    source, artifact = (
        load_file(checkpoints("gemma3") / "model.safetensors"),
        load_file(artifacts("gemma3") / "model.safetensors"),
    )
    companions = [key for key in source if "vision_tower" in key or "multi_modal_projector" in key]
    assert companions
    for key in companions:
        assert torch.equal(source[key], artifact[key])
    config = json.loads((artifacts("gemma3") / "config.json").read_text())
    skipped = config["quantization_config"]["modules_to_not_convert"]
    for key in companions:
        assert any(name in key for name in skipped)


def test_a_large_tensor_is_copied_in_pieces(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    checkpoints: Callable[[str], Path],
    text_file: Path,
    capsys: Capture,
) -> None:
    from tests.tiny import edit_weights

    monkeypatch.setattr(weight_files, "PIECE_BYTES", 10_000)
    read = weight_files.read_pieces
    table = "model.embed_tokens_per_layer.weight"
    source = Checkpoint(checkpoints("gemma4_text"))
    pieces = list(read(table, source.tensors[table]))
    assert len(pieces) > 2
    assert all(piece.nbytes <= 10_000 for piece in pieces)
    assert torch.equal(torch.cat(pieces), as_tensor(source.mapped(table)))
    arguments = ("--num-samples", "2", "--quality", "fast")
    assert main(quantize_arguments(source.folder, tmp_path / "out", text_file, *arguments)) == 0
    assert np.array_equal(Checkpoint(tmp_path / "out").mapped(table), source.mapped(table))
    damaged = shutil.copytree(source.folder, tmp_path / "damaged")
    edit_weights(damaged, lambda tensors: tensors[table][-1].fill_(torch.nan))  # of a token that the text does not have
    assert main(quantize_arguments(damaged, tmp_path / "none", text_file, *arguments)) == 1
    assert f"{table} holds NaN" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_keys_and_values_that_nobody_reads_are_dropped(
    tmp_path: Path,
    artifacts: Callable[[str], Path],
    checkpoints: Callable[[str], Path],
    text_file: Path,
    capsys: Capture,
) -> None:
    """16-bit files hold them in layers that read another layer's; without a word they are left out."""
    from tests.tiny import edit_weights

    folder = shutil.copytree(checkpoints("gemma4_text"), tmp_path / "tiny")
    unused = {
        f"model.layers.5.self_attn.{name}.weight": torch.randn(shape).to(torch.bfloat16)
        for name, shape in {"k_proj": (64, 64), "v_proj": (64, 64), "k_norm": (32,)}.items()
    }
    edit_weights(folder, lambda tensors: tensors.update(unused))
    assert Checkpoint(folder).notes == ()
    assert main(quantize_arguments(folder, tmp_path / "out", text_file)) == 0
    assert "Ignored" not in capsys.readouterr().err
    made, known = (load_file(f / "model.safetensors") for f in (tmp_path / "out", artifacts("gemma4_text")))
    assert made.keys() == known.keys()
    assert all(torch.equal(tensor, known[name]) for name, tensor in made.items())


def test_scales_read_the_same_in_float16_and_bfloat16(artifacts: Callable[[str], Path]) -> None:
    tensors = load_file(artifacts("gemma") / "model.safetensors")
    scales = [tensor for key, tensor in tensors.items() if key.endswith(".scales")]
    assert len(scales) == 3 * 7
    for tensor in scales:
        assert torch.equal(tensor.float(), tensor.to(torch.bfloat16).float())


def test_the_same_command_gives_the_same_bytes(
    tmp_path: Path, artifacts: Callable[[str], Path], checkpoints: Callable[[str], Path], text_file: Path
) -> None:
    assert main(quantize_arguments(checkpoints("gemma2"), tmp_path / "again", text_file)) == 0
    for path in sorted(artifacts("gemma2").iterdir()):
        if path.name != "quantization_report.json":
            assert (
                hashlib.sha256(path.read_bytes()).digest()
                == hashlib.sha256((tmp_path / "again" / path.name).read_bytes()).digest()
            )


def test_an_untied_head_is_kept(tmp_path: Path, text_file: Path) -> None:
    from tests.tiny import edit_weights

    folder = make_checkpoint(tmp_path / "untied", "gemma")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    edit_weights(folder, lambda t: t.update({"lm_head.weight": torch.randn(264, 64).to(torch.bfloat16)}))
    assert main(quantize_arguments(folder, tmp_path / "out", text_file)) == 0
    source, artifact = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(source["lm_head.weight"], artifact["lm_head.weight"])


@torch.inference_mode()
def test_a_float16_artifact_of_gemma_1(tmp_path: Path, checkpoints: Callable[[str], Path], text_file: Path) -> None:
    """The folds are exact in the dtype that is stored, whichever it is."""
    out = tmp_path / "half"
    assert main(quantize_arguments(checkpoints("gemma"), out, text_file, "--dtype", "float16")) == 0
    tensors = load_file(out / "model.safetensors")
    assert tensors["model.layers.0.input_layernorm.weight"].dtype == torch.float16
    assert json.loads((out / "config.json").read_text())["dtype"] == "float16"
    packed = PackedWeight(*(tensors[f"model.layers.0.mlp.up_proj.{kind}"] for kind in PackedWeight._fields))
    assert torch.isfinite(dequantize(*unpack_weight(packed))).all()


def test_large_artifacts_are_sharded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoints: Callable[[str], Path], text_file: Path
) -> None:
    from gemma_awq_cli.models.checkpoints import writing
    from gemma_awq_cli.models.forward.loading import open_model

    monkeypatch.setattr(writing, "SHARD_BYTES", 50_000)
    assert main(quantize_arguments(checkpoints("gemma"), tmp_path / "out", text_file)) == 0
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1
    assert open_model(tmp_path / "out", torch.device("cpu")).quantized
