"""Damaged and foreign checkpoints: each gets its own message, before anything is computed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward.layerwise import TextStack
from gemma_awq_cli.models.forward.precision import default_dtype_name
from gemma_awq_cli.quantize.plan import stored_dtype
from gemma_awq_cli.quantize.preparation import require_quantizable
from tests.tiny import edit_weights, make_checkpoint


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "tiny", "gemma3_text")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "sharded", "gemma2", sharded=True)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def open_stack(folder: Path) -> TextStack:
    return TextStack(Checkpoint(folder), torch.device("cpu"))


def test_an_unsupported_family_is_told_what_is_supported(tiny: Path) -> None:
    edit_config(tiny, model_type="llama")
    with pytest.raises(GemmaAwqError, match="'llama' is not supported") as error:
        Checkpoint(tiny)
    for name in ("gemma (", "gemma2", "gemma3_text", "gemma3 ("):
        assert name in error.value.hint


def test_a_truncated_file(tiny: Path) -> None:
    path = tiny / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(GemmaAwqError, match="damaged or truncated"):
        Checkpoint(tiny)


def test_a_missing_file(tiny: Path) -> None:
    (tiny / "model.safetensors").unlink()
    with pytest.raises(GemmaAwqError, match=r"has no model\.safetensors"):
        Checkpoint(tiny)


def test_an_index_that_names_a_missing_shard(sharded: Path) -> None:
    shards = sorted(sharded.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    with pytest.raises(GemmaAwqError, match=f"missing: {shards[1].name}"):
        Checkpoint(sharded)


def test_an_index_that_names_a_missing_tensor(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.layers.9.mlp.up_proj.weight"] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content))
    with pytest.raises(GemmaAwqError, match=r"no file holds: model.layers.9"):
        Checkpoint(sharded)


def test_a_tensor_of_another_shape(tiny: Path) -> None:
    edit_weights(tiny, lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(4, 4)}))
    with pytest.raises(GemmaAwqError, match=r"has shape \[4, 4\], but config.json asks for \[96, 64\]"):
        open_stack(tiny)


def test_a_missing_tensor(tiny: Path) -> None:
    edit_weights(tiny, lambda t: t.pop("model.layers.2.self_attn.k_norm.weight"))
    with pytest.raises(GemmaAwqError, match=r"lacks the tensor model.layers.2.self_attn.k_norm.weight"):
        open_stack(tiny)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_in_the_weights(tiny: Path, value: float) -> None:
    edit_weights(tiny, lambda t: t["model.layers.1.mlp.down_proj.weight"].view(-1)[7].fill_(value))
    with pytest.raises(GemmaAwqError, match=r"model.layers.1.mlp.down_proj.weight holds NaN or infinite"):
        open_stack(tiny).read_layer(1)


def test_a_checkpoint_that_is_quantized_already(artifacts: Callable[[str], Path]) -> None:
    with pytest.raises(GemmaAwqError, match=r"quantized already \(awq gemm 4-bit\)"):
        require_quantizable(Checkpoint(artifacts("gemma3_text")))


def test_a_damaged_config(tiny: Path) -> None:
    (tiny / "config.json").write_text("not json")
    with pytest.raises(GemmaAwqError, match="not valid JSON"):
        Checkpoint(tiny)


def test_a_multimodal_checkpoint_in_the_hubs_layout(tmp_path: Path) -> None:
    """google/gemma-3-4b-it stores `language_model.model.*` and `vision_tower.*`; the keys stay as they are."""
    folder = make_checkpoint(tmp_path / "mm", "gemma3")

    def as_on_the_hub(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            new = key.replace("model.language_model.", "language_model.model.")
            new = new.removeprefix("model.") if new.startswith(("model.vision_tower", "model.multi_modal")) else new
            tensors[new] = tensors.pop(key)

    edit_weights(folder, as_on_the_hub)
    checkpoint = Checkpoint(folder)
    assert checkpoint.key("model.norm.weight") == "language_model.model.norm.weight"
    assert checkpoint.companions()
    assert all(key.startswith(("vision_tower.", "multi_modal_projector.")) for key in checkpoint.companions())
    open_stack(folder)


@pytest.mark.parametrize("kind", ["gemma", "gemma3_text"])
def test_the_stored_dtype_counts_and_not_the_declared_one(kind: str, tmp_path: Path) -> None:
    """AutoRound declares float16 over weights in bfloat16, and Gemma 2 and 3 overflow float16."""
    folder = make_checkpoint(tmp_path / "tiny", kind)
    assert not Checkpoint(folder).notes
    edit_config(folder, dtype="float16")
    checkpoint = Checkpoint(folder)
    assert stored_dtype(checkpoint, None) == checkpoint.dtype == torch.bfloat16
    assert default_dtype_name(checkpoint, "cuda") == "bfloat16"
    note = "config.json declares float16, but most weights are stored in bfloat16, which counts here."
    assert checkpoint.notes == (note,)


def test_a_few_tensors_in_another_dtype_do_not_count(tiny: Path) -> None:
    edit_weights(tiny, lambda tensors: tensors.update({n: t.float() for n, t in tensors.items() if "norm" in n}))
    assert Checkpoint(tiny).dtype == torch.bfloat16
    edit_weights(tiny, lambda tensors: tensors.update({n: t.half() for n, t in tensors.items() if "proj" in n}))
    assert Checkpoint(tiny).dtype == torch.float16


def test_weights_of_32_bits_become_what_is_declared(tiny: Path) -> None:
    edit_weights(tiny, lambda tensors: tensors.update({name: tensor.float() for name, tensor in tensors.items()}))
    checkpoint = Checkpoint(tiny)
    assert (checkpoint.dtype, checkpoint.notes) == (torch.bfloat16, ())
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps({key: value for key, value in config.items() if "dtype" not in key}))
    assert Checkpoint(tiny).dtype == torch.float32


def test_the_dtype_of_an_artifact_is_that_of_what_is_not_packed(
    artifacts: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(artifacts("gemma"), tmp_path / "artifact"))
    edit_config(folder, dtype="float16")
    checkpoint = Checkpoint(folder)
    assert checkpoint.dtype == torch.bfloat16
    assert "declares float16" in " ".join(checkpoint.notes)
