"""Towers and embedders of multimodal checkpoints: complete, of the config's sizes, and what remains without them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.companions import require_companions
from gemma_awq_cli.models.checkpoints.weight_files import require_finite
from gemma_awq_cli.models.gemma.families import FAMILIES
from tests.models.checkpoints.test_checkpoint import edit_config
from tests.tiny import edit_weights

MULTIMODAL = [name for name, family in FAMILIES.items() if family.companions]
# a tensor of each part: its family, its name, and the size in config.json that tells its first dimension
SIZED = [
    ("gemma3", "vision_tower.encoder.layers.0.mlp.fc1.bias", "vision_config", "intermediate_size"),
    ("gemma3n", "model.audio_tower.conformer.0.attention.post_norm.weight", "audio_config", "hidden_size"),
    ("gemma3n", "model.embed_vision.embedding.weight", "vision_config", "vocab_size"),
    ("gemma3n", "model.embed_audio.embedding.weight", "audio_config", "vocab_size"),
    ("gemma4", "model.vision_tower.encoder.layers.0.mlp.gate_proj.linear.weight", "vision_config", "intermediate_size"),
    ("gemma4", "model.audio_tower.output_proj.bias", "audio_config", "output_proj_dims"),
    ("gemma4_unified", "model.vision_embedder.pos_embedding", "vision_config", "mm_posemb_size"),
]  # fmt: skip


@pytest.fixture
def copy(checkpoints: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda kind: Path(shutil.copytree(checkpoints(kind), tmp_path / kind))


def section_of(folder: Path, name: str) -> dict[str, Any]:
    section: dict[str, Any] = json.loads((folder / "config.json").read_text())[name]
    return section


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_every_part_is_found_and_needed(copy: Callable[[str], Path], kind: str) -> None:
    folder = copy(kind)
    whole = Checkpoint(folder)
    require_companions(whole)
    names = whole.companions()
    assert whole.tensors.keys() == {*names, *whole.text_tensors()}
    saved = load_file(folder / "model.safetensors")
    for part in FAMILIES[kind].companions:
        own = [name for name in names if f"{part.name}." in name]
        assert own
        edit_weights(folder, lambda tensors, gone=own: [tensors.pop(name) for name in gone])
        with pytest.raises(GemmaAwqError, match=f"lacks all tensors of its {part.name}, which config.json") as error:
            require_companions(Checkpoint(folder))
        assert f"remove every tensor of {FAMILIES[kind].companions[0].name}" in error.value.hint
        edit_weights(folder, lambda tensors: tensors.update(saved))


@pytest.mark.parametrize(("kind", "name", "section", "size"), SIZED)
def test_a_part_of_another_model_is_refused(
    copy: Callable[[str], Path], kind: str, name: str, section: str, size: str
) -> None:
    folder = copy(kind)
    edit_weights(folder, lambda tensors: tensors.update({name: torch.zeros(3)}))
    held = section_of(folder, section)[size]
    with pytest.raises(GemmaAwqError, match=rf"has shape \[3\], but config.json asks for \[{held}"):
        require_companions(Checkpoint(folder))
    edit_weights(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(GemmaAwqError, match=f"lacks 1 tensors of its {name.removeprefix('model.').split('.')[0]}"):
        require_companions(Checkpoint(folder))


@pytest.mark.parametrize(
    ("kind", "section", "change", "message"),
    [
        ("gemma3n", "vision_config", {"model_type": "siglip_vision_model"}, "gemma3n_vision"),
        ("gemma3n", "vision_config", {"hidden_size": 0}, "vision_config.hidden_size"),
        ("gemma3n", "audio_config", {"conf_num_hidden_layers": 10**8}, "conf_num_hidden_layers"),
        ("gemma3n", "audio_config", {"conf_num_hidden_layers": 1000}, "has conf_num_hidden_layers 1000, but the files"),
        ("gemma3n", "audio_config", {"sscp_conv_channel_size": [8, "x"]}, "sscp_conv_channel_size"),
        ("gemma4", "vision_config", {"num_hidden_layers": 1000}, "has num_hidden_layers 1000, but the files hold only"),
        ("gemma4", "vision_config", {"num_hidden_layers": 2**40}, "vision_config.num_hidden_layers"),
        ("gemma4", "vision_config", {"head_dim": True}, "vision_config.head_dim"),
        ("gemma4", "audio_config", {"num_hidden_layers": 2}, "lacks .* tensors of its audio_tower"),
        ("gemma4", "audio_config", {"num_attention_heads": 0}, "audio_config.num_attention_heads"),
        ("gemma4", "audio_config", {"subsampling_conv_channels": [8]}, "audio_config in .* cannot be used"),
        ("gemma4", "audio_config", 5, "audio_config is 5; it must be an object"),
        ("gemma4_unified", "vision_config", {"mm_posemb_size": 2**63}, "vision_config.mm_posemb_size"),
        ("gemma4_unified", "vision_config", {"patch_size": 2**31 - 1}, "vision_config"),
        ("gemma4_unified", "audio_config", {"audio_embed_dim": 41}, "embed_audio.* has shape"),
    ],
)
def test_sections_that_cannot_be_used(
    copy: Callable[[str], Path], kind: str, section: str, change: object, message: str
) -> None:
    folder = copy(kind)
    now = {**section_of(folder, section), **change} if isinstance(change, dict) else change
    edit_config(folder, **{section: now})
    with pytest.raises(GemmaAwqError, match=message):
        require_companions(Checkpoint(folder))


@pytest.mark.parametrize("kind", ["gemma4", "gemma4_unified"])
def test_a_size_without_an_audio_part(copy: Callable[[str], Path], kind: str) -> None:
    """gemma-4-31B and 26B-A4B have none: their config says null."""
    folder = copy(kind)
    edit_config(folder, audio_config=None)
    edit_weights(folder, lambda tensors: [tensors.pop(name) for name in [*tensors] if "audio" in name])
    require_companions(Checkpoint(folder))


def test_a_bound_may_be_infinite_and_a_weight_may_not() -> None:
    infinite = torch.tensor(float("inf"))
    require_finite("model.audio_tower.layers.0.feed_forward1.ffw_layer_2.output_max", infinite)
    for name, value in (("a.output_max", torch.tensor(float("nan"))), ("a.weight", infinite)):
        with pytest.raises(GemmaAwqError, match=f"{name} holds NaN or infinite values"):
            require_finite(name, value)


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_the_language_model_alone(copy: Callable[[str], Path], kind: str) -> None:
    """It is read under its text type, as transformers reads a text model of these weights."""
    folder = copy(kind)
    prefixes = FAMILIES[kind].companion_prefixes
    edit_weights(folder, lambda tensors: [tensors.pop(name) for name in [*tensors] if name.startswith(prefixes)])
    checkpoint = Checkpoint(folder)
    assert checkpoint.family.model_type == FAMILIES[kind].text_type
    assert any("is read as a text model" in note for note in checkpoint.notes)
    assert not checkpoint.companions()

    (folder / "config.json").write_text(json.dumps(checkpoint.raw_config))

    def as_text(tensors: dict[str, Tensor]) -> None:
        for name in [*tensors]:
            tensors[name.replace("language_model.model.", "model.").replace("model.language_model.", "model.")] = (
                tensors.pop(name)
            )

    edit_weights(folder, as_text)
    assert Checkpoint(folder).notes == ()
    text, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(text).__name__ == checkpoint.family.model_class
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert Checkpoint(folder).text_config.to_dict() == checkpoint.text_config.to_dict()


@pytest.mark.parametrize("kind", [kind for kind in MULTIMODAL if kind != "gemma3n"])  # timm makes its vision tower
def test_the_parts_have_the_names_that_transformers_reads(checkpoints: Callable[[str], Path], kind: str) -> None:
    model_class = getattr(transformers, FAMILIES[kind].model_class)
    _, report = model_class.from_pretrained(checkpoints(kind), output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
