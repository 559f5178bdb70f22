"""Tensor names: those that are read, those that are told apart, and those that nobody reads; other quantizations."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gemma_awq_cli.cli.app import main
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward.loading import open_model
from gemma_awq_cli.models.forward.verification import require_complete
from gemma_awq_cli.quantize.preparation import require_quantizable
from gemma_awq_cli.system.arrays import as_tensor
from tests.conftest import quantize_arguments
from tests.models.checkpoints.test_checkpoint import edit_config, open_stack
from tests.tiny import edit_weights

Rename = Callable[[dict[str, Tensor]], None]
MODEL = "model.embed_tokens.weight"


@pytest.fixture
def copy(checkpoints: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda kind: Path(shutil.copytree(checkpoints(kind), tmp_path / kind))


def renamed(pattern: str, new: str) -> Rename:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[re.sub(pattern, new, name)] = tensors.pop(name)

    return change


def same_tensors(one: Path, other: Path) -> bool:
    ours, theirs = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


# names that are read, and how the artifact calls them


@pytest.mark.parametrize("prefix", ["", "language_model.model.", "model.language_model.", "language_model."])
def test_a_text_model_by_other_names(
    copy: Callable[[str], Path], artifacts: Callable[[str], Path], text_file: Path, tmp_path: Path, prefix: str
) -> None:
    """The artifact has the names that every reader knows."""
    folder = copy("gemma3_text")
    edit_weights(folder, renamed(r"^model\.", prefix))
    checkpoint = Checkpoint(folder)
    assert checkpoint.key(MODEL) == f"{prefix}embed_tokens.weight"
    assert checkpoint.notes == ()
    assert open_model(folder, torch.device("cpu")).forward.text is not None
    assert main(quantize_arguments(folder, tmp_path / "artifact", text_file)) == 0
    assert same_tensors(tmp_path / "artifact", artifacts("gemma3_text"))


def test_a_multimodal_model_that_was_saved_without_its_heads_class(
    copy: Callable[[str], Path], artifacts: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    folder = copy("gemma3")
    edit_weights(folder, renamed(r"^language_model\.model\.", "language_model."))
    assert main(quantize_arguments(folder, tmp_path / "artifact", text_file)) == 0
    assert same_tensors(tmp_path / "artifact", artifacts("gemma3"))


def without_tower(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if not name.startswith("language_model.")]:
        del tensors[name]


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model.", "model."])
def test_a_multimodal_model_without_its_tower_becomes_a_text_artifact(
    copy: Callable[[str], Path],
    artifacts: Callable[[str], Path],
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    prefix: str,
) -> None:
    folder, artifact = copy("gemma3"), tmp_path / "artifact"
    edit_weights(folder, without_tower)
    edit_weights(folder, renamed(r"^language_model\.model\.", prefix))
    assert main(quantize_arguments(folder, artifact, text_file)) == 0
    assert "warning: gemma3 has no vision tower and is read as a text model" in capsys.readouterr().err
    config = json.loads((artifact / "config.json").read_text())
    assert config["model_type"] == "gemma3_text"
    assert config["architectures"] == ["Gemma3ForCausalLM"]
    assert config["hidden_size"] == 64
    assert not {"text_config", "vision_config"} & config.keys()
    assert config["quantization_config"]["modules_to_not_convert"] == ["lm_head"]
    report = json.loads((artifact / "quantization_report.json").read_text())
    require_complete(artifact, report["artifact"]["bytes"])  # what push asks
    whole = {
        name.removeprefix("language_"): tensor
        for name, tensor in load_file(artifacts("gemma3") / "model.safetensors").items()
        if name.startswith("language_model.")
    }
    ours = load_file(artifact / "model.safetensors")
    assert {f"model.{name}" for name in ours} == set(whole)
    assert all(torch.equal(ours[name], whole[f"model.{name}"]) for name in ours)


@pytest.mark.parametrize(
    "gone",
    [
        "vision_tower.encoder.layers.0.mlp.fc1.bias", "vision_tower.embeddings.patch_embedding.weight",
        "multi_modal_projector.mm_input_projection_weight",
    ],
)  # fmt: skip
def test_part_of_a_tower_is_refused_before_quantizing(copy: Callable[[str], Path], gone: str) -> None:
    folder = copy("gemma3")
    require_quantizable(Checkpoint(folder))
    edit_weights(folder, lambda tensors: tensors.pop(gone))
    with pytest.raises(GemmaAwqError, match=f"lacks 1 tensors of its {gone.split('.')[0]}: {gone}") as error:
        require_quantizable(Checkpoint(folder))
    assert "remove every tensor of vision_tower, multi_modal_projector from the files" in error.value.hint
    edit_weights(folder, without_tower)  # as the hint says
    require_quantizable(Checkpoint(folder))


def test_a_tower_of_another_model_is_refused_before_quantizing(copy: Callable[[str], Path]) -> None:
    folder = copy("gemma3")
    name = "vision_tower.encoder.layers.0.mlp.fc1.bias"
    edit_weights(folder, lambda tensors: tensors.update({name: torch.zeros(3)}))
    with pytest.raises(GemmaAwqError, match=r"has shape \[3\], but config.json asks for \[48\]"):
        require_quantizable(Checkpoint(folder))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("siglip", "vision_config"),
        ([], "vision_config"),
        ({"model_type": "nope"}, "nope"),
        ({"model_type": "clip_vision_model"}, "clip_vision_model"),
        ({"hidden_size": "x"}, "hidden_size"),
        ({"hidden_size": 0}, "vision_config"),
        ({"hidden_size": -1}, "vision_config"),
        ({"hidden_size": 2**63}, "vision_config"),
        ({"num_hidden_layers": 10**9}, "vision_config.*1000000000"),
        ({"num_hidden_layers": 2}, r"lacks \d+ tensors of its vision_tower"),
        ({"num_attention_heads": 0}, "vision_config"),
        ({"patch_size": 0}, "cannot be used"),
        ({"hidden_act": "nope"}, "cannot be used"),
    ],
)
def test_a_vision_config_that_cannot_be_used(copy: Callable[[str], Path], value: object, message: str) -> None:
    folder = copy("gemma3")
    vision = json.loads((folder / "config.json").read_text())["vision_config"]
    edit_config(folder, vision_config={**vision, **value} if isinstance(value, dict) else value)
    with pytest.raises(GemmaAwqError, match=message):
        require_quantizable(Checkpoint(folder))


@pytest.mark.parametrize(
    "rename",
    [(r"^vision_tower\.", "vision_tower.vision_model."), (r"^(vision|multi)", r"model.\1"), (r"\.head\..*", ".head.x")],
)
def test_towers_by_the_names_of_other_versions(copy: Callable[[str], Path], rename: tuple[str, str]) -> None:
    folder = copy("gemma3")
    edit_weights(folder, renamed(*rename))
    require_quantizable(Checkpoint(folder))


# names that are told apart


def with_lora(tensors: dict[str, Tensor]) -> None:
    name = "model.layers.0.self_attn.q_proj"
    tensors[f"{name}.base_layer.weight"] = tensors.pop(f"{name}.weight")
    tensors[f"{name}.lora_A.default.weight"] = torch.zeros(4, 64)


def unmerged(tensors: dict[str, Tensor]) -> None:
    with_lora(tensors)
    renamed("^", "base_model.model.")(tensors)


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        (unmerged, r"adapter that was not merged \(base_model\.model\.", "merge_and_unload"),
        (with_lora, r"adapter that was not merged \(model\.layers\.0", "merge_and_unload"),
        (renamed("^", "base_model.model."), r"The prefix base_model\.model\. is PEFT's", "merge_and_unload"),
        (
            renamed("^", "module."),
            r"names like module\.model\.embed_tokens.*The prefix is module\.",
            "model.module",
        ),
        (renamed("^", "_orig_mod."), r"The prefix is _orig_mod\.", "_orig_mod"),
        (
            renamed(r"^model\.", "transformer."),
            r"names like transformer\.embed_tokens\.weight",
            r"from transformer\.\* to m",
        ),
        (renamed(r"^model\.embed_tokens", "embedder"), r"holds no embedding.*it holds embedder\.weight", "convert"),
        (renamed(r"^model\.(\w+)", r"blk.\1.q"), "holds no embedding", "convert them to transformers' format"),
    ],
)
def test_names_of_other_tools(copy: Callable[[str], Path], change: Rename, message: str, hint: str) -> None:
    folder = copy("gemma3_text")
    edit_weights(folder, change)
    with pytest.raises(GemmaAwqError, match=message) as error:
        Checkpoint(folder)
    assert re.search(hint, error.value.hint)
    assert "ownload" not in error.value.hint or "Otherwise" in error.value.hint


# names that nobody reads


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", "model.embed_tokens.embed_scale",
        "model.rotary_emb_local.inv_freq", "model.embeddings.position_ids", "position_ids", "model.normalizer",
        "model.rotary_emb.full_attention_inv_freq",
    ],
)  # fmt: skip
def test_known_buffers_are_left_out_without_a_word(copy: Callable[[str], Path], name: str) -> None:
    folder = copy("gemma3_text")
    edit_weights(folder, lambda tensors: tensors.update({name: torch.zeros(3)}))
    assert Checkpoint(folder).notes == ()


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("gemma3_text", "model.layers.0.self_attn.q_proj.bias"),
        ("gemma3_text", "model.layers.0.mlp.extra.weight"),
        ("gemma3_text", "model.layers.0.input_layernorm.bias"),
        ("gemma3_text", "vision_tower.weight"),
        ("gemma3_text", "score.weight"),
        ("gemma", "model.layers.0.pre_feedforward_layernorm.weight"),
        ("gemma2", "model.layers.0.self_attn.q_norm.weight"),
        ("gemma3", "audio_tower.weight"),
        ("gemma3", "model.embed_tokens.weight"),
    ],
)
def test_tensors_that_nobody_reads_are_named(
    copy: Callable[[str], Path], kind: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy(kind)
    single = folder / "model.safetensors"
    if not single.exists():  # sharded
        single = next(folder.glob("model-*"))
        single.rename(folder / "model.safetensors")
        edit_weights(folder, lambda tensors: tensors.update({name: torch.zeros(3)}))
        (folder / "model.safetensors").rename(single)
    else:
        edit_weights(folder, lambda tensors: tensors.update({name: torch.zeros(3)}))
    (note,) = Checkpoint(folder).notes
    assert name in note
    assert main(["run", "Hello", "-m", str(folder), "--device", "cpu", "--max-new-tokens", "1"]) == 0
    assert f"warning: {note}" in capsys.readouterr().err


def test_many_of_them_are_counted(copy: Callable[[str], Path]) -> None:
    folder = copy("gemma3_text")
    edit_weights(folder, lambda tensors: tensors.update({f"x{i}": torch.zeros(1) for i in range(100)}))
    (note,) = Checkpoint(folder).notes
    assert "and 97 more" in note


def test_more_layers_than_the_config_says(copy: Callable[[str], Path]) -> None:
    folder = copy("gemma3_text")
    edit_config(folder, num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    with pytest.raises(GemmaAwqError, match=r"num_hidden_layers.* 2.* the (files|tensors) h.* 3") as error:
        Checkpoint(folder)
    assert "config.json" in error.value.hint


# how it is quantized


def spelled(folder: Path, section: object) -> None:
    edit_config(folder, quantization_config=section)


OURS = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 32, "zero_point": True}


@pytest.mark.parametrize(
    "section",
    [
        OURS,
        {**OURS, "quant_method": "AWQ", "version": "GEMM"},
        {"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"},  # AutoAWQ
        {"quant_method": "awq", "bits": 4, "group_size": 32, "format": "gemm", "pack_dtype": "int32"},  # GPTQModel
        {"quant_method": "awq", "bits": 4, "group_size": 32},  # transformers' defaults
        {**OURS, "version": None, "backend": "autoawq"},
    ],
)
def test_the_same_quantization_by_other_keys(artifacts: Callable[[str], Path], tmp_path: Path, section: object) -> None:
    folder = Path(shutil.copytree(artifacts("gemma3_text"), tmp_path / "artifact"))
    spelled(folder, section)
    expected = as_tensor(
        open_model(artifacts("gemma3_text"), torch.device("cpu")).session(1, 8).next_logits([[2, 7, 9]])
    )
    assert torch.equal(
        as_tensor(open_model(folder, torch.device("cpu")).session(1, 8).next_logits([[2, 7, 9]])), expected
    )


def test_a_quantization_that_a_file_beside_the_config_tells(artifacts: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(artifacts("gemma3_text"), tmp_path / "artifact"))
    spelled(folder, None)
    (folder / "quant_config.json").write_text('{"zero_point": true, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}')
    logits, expected = (
        open_model(one, "cpu").session(1, 8).next_logits([[2, 70, 71]]) for one in (folder, artifacts("gemma3_text"))
    )
    assert np.array_equal(logits, expected)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({**OURS, "version": "exllama"}, "quantized as awq exllama 4-bit, which is not read; what is: 4-bit AWQ"),
        ({**OURS, "version": "llm-awq"}, "awq llm-awq 4-bit"),
        ({**OURS, "backend": "llm-awq"}, "awq llm-awq 4-bit"),
        ({**OURS, "bits": 8}, "awq gemm 8-bit"),
        ({"quant_method": "awq", "w_bit": 3, "q_group_size": 32}, "awq gemm 3-bit"),
        ({"quant_method": "gptq", "bits": 8, "group_size": 32}, "gptq 8-bit"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}, "act-order"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "marlin"}, "gptq marlin 4-bit"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors pack-quantized"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "float-quantized",
                "config_groups": {"0": {"weights": {"num_bits": 8, "type": "float"}}},
            },
            "compressed-tensors float-quantized",
        ),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "by bitsandbytes"),
        ({"quant_method": "fp8"}, "quantized as fp8"),
        ({"quant_method": ["awq"]}, "quantized as "),
        ({}, "an unnamed method"),
        ([], "quantization_config is not a JSON object"),
        ("awq", "quantization_config is not a JSON object"),
    ],
)
def test_other_quantizations_are_named(
    artifacts: Callable[[str], Path], tmp_path: Path, section: object, message: str
) -> None:
    folder = Path(shutil.copytree(artifacts("gemma3_text"), tmp_path / "artifact"))
    spelled(folder, section)
    with pytest.raises(GemmaAwqError, match=message) as error:
        open_model(folder, torch.device("cpu"))
    assert error.value.hint
    with pytest.raises(GemmaAwqError, match=r"quantized already|quantization_config is not"):
        require_quantizable(Checkpoint(folder))


def test_packed_weights_that_the_config_does_not_tell_of(artifacts: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(artifacts("gemma3_text"), tmp_path / "artifact"))
    spelled(folder, None)
    with pytest.raises(GemmaAwqError, match=r"holds quantized weights \(model.*qweight\), but its config.json has no"):
        Checkpoint(folder)


def test_16_bit_weights_that_the_config_calls_packed(copy: Callable[[str], Path]) -> None:
    folder = copy("gemma3_text")
    spelled(folder, OURS)
    with pytest.raises(GemmaAwqError, match="has a quantization_config, but the weights are not packed") as error:
        Checkpoint(folder)
    assert "remove quantization_config" in error.value.hint
    spelled(folder, None)
    open_stack(folder)
