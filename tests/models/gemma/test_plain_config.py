"""config.json read without transformers says what transformers says, or nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.forward.torch_decoder import FEATURES
from gemma_awq_cli.models.gemma.architecture import Architecture, architecture_of
from gemma_awq_cli.models.gemma.config_values import KINDS, require_sound, text_values
from gemma_awq_cli.models.gemma.families import FAMILIES as FAMILIES_BY_TYPE
from gemma_awq_cli.models.gemma.families import family_of
from gemma_awq_cli.models.gemma.features import features_of, missing_features
from gemma_awq_cli.models.gemma.plain_config import plain_text_config
from gemma_awq_cli.models.gemma.text_config import transformers_text_config
from tests import samples
from tests.conftest import FAMILIES
from tests.tiny import CONFIGS

# as the hub has them, from before transformers 5
GEMMA_7B = {
    "architectures": ["GemmaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 2,
    "eos_token_id": 1, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 3072, "initializer_range": 0.02, "intermediate_size": 24576, "max_position_embeddings": 8192,
    "model_type": "gemma", "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 16,
    "pad_token_id": 0, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000.0, "torch_dtype": "bfloat16",
    "transformers_version": "4.38.0.dev0", "use_cache": True, "vocab_size": 256000,
}  # fmt: skip
GEMMA3_270M = {
    "_sliding_window_pattern": 6, "architectures": ["Gemma3ForCausalLM"], "attention_bias": False,
    "attention_dropout": 0.0, "attn_logit_softcapping": None, "bos_token_id": 2, "eos_token_id": 1,
    "final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 640,
    "initializer_range": 0.02, "intermediate_size": 2048,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3, "max_position_embeddings": 32768,
    "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 18, "num_key_value_heads": 1,
    "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000.0,
    "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": 512, "torch_dtype": "bfloat16",
    "transformers_version": "4.55.0.dev0", "use_bidirectional_attention": False, "use_cache": True,
    "vocab_size": 262144,
}  # fmt: skip
GEMMA_2B = {**GEMMA_7B, "hidden_act": "gelu", "hidden_activation": None, "num_key_value_heads": 1}
GEMMA3_4B_IT = {
    "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000,
    "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
    "vision_config": {
        "hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "model_type": "siglip_vision_model",
        "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False,
    },
}  # fmt: skip


def theirs(raw: dict[str, Any], folder: Path) -> Any:
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    return AutoConfig.from_pretrained(folder).get_text_config()


def same(ours: Architecture, other: Architecture) -> bool:
    ropes = [[(rope.inv_freq.tolist(), rope.factor) for rope in arch.ropes] for arch in (ours, other)]
    fields = [{k: v for k, v in vars(arch).items() if k != "ropes"} for arch in (ours, other)]
    return ropes[0] == ropes[1] and fields[0] == fields[1]


def raw_of(kind: str) -> dict[str, Any]:
    if kind in ("gemma-7b", "gemma-3-270m"):
        return dict(GEMMA_7B if kind == "gemma-7b" else GEMMA3_270M)
    raw: dict[str, Any] = json.loads(CONFIGS[kind]().to_json_string(use_diff=False))
    return raw


def section_of(raw: dict[str, Any]) -> dict[str, Any]:
    """The part of a config.json that describes the language model."""
    name = family_of(raw["model_type"]).text_section
    section: dict[str, Any] = raw if name is None else raw[name]
    return section


def values_of(raw: dict[str, Any]) -> dict[str, Any]:
    section = section_of(raw)
    return text_values(raw, family_of(raw["model_type"]), Path("config.json"), section["num_hidden_layers"])


@pytest.mark.parametrize("kind", [*FAMILIES, "gemma-7b", "gemma-3-270m"])
def test_it_says_what_transformers_says(kind: str, tmp_path: Path) -> None:
    raw = raw_of(kind)
    plain, config = plain_text_config(values_of(raw)), theirs(raw, tmp_path)
    assert plain is not None
    family = family_of(raw["model_type"])
    assert missing_features(features_of(plain, family), FEATURES) is None
    assert same(architecture_of(plain, family), architecture_of(config, family))
    for name in ("num_hidden_layers", "tie_word_embeddings", "bos_token_id", "vocab_size", "max_position_embeddings"):
        assert getattr(plain, name) == getattr(config, name), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", samples.of(
    [*FAMILIES, "gemma-7b", "gemma-3-270m"], ["gemma2", "gemma3", "gemma3n_text", "gemma4-experts", "gemma-7b"]
))  # fmt: skip
def test_whatever_is_left_out_it_never_says_anything_else(kind: str, tmp_path: Path) -> None:
    """Each value missing, null, of another type, or another number: the same as transformers, or nothing.

    And the config that is made of the checked values alone is the one that transformers reads from the file.
    """
    whole = raw_of(kind)
    family, agreed, filled, refused = family_of(whole["model_type"]), 0, 0, 0
    section = section_of(whole)
    layers = section["num_hidden_layers"]
    for name, value in list(section.items()):
        for change in (..., None, "x", True, 2, 0.5, {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0}):
            section[name] = change
            if change is ...:
                del section[name]
            if whole.get("model_type") == family.model_type and name != "transformers_version":
                try:
                    values = text_values(whole, family, tmp_path / "config.json", layers)
                    require_sound(transformers_text_config(values, tmp_path), family, tmp_path / "config.json")
                except GemmaAwqError:
                    refused += 1
                    section[name] = value
                    continue
                try:
                    config = theirs(whole, tmp_path)
                except Exception:  # noqa: BLE001 (over what is no part of the language model, or needs no refusal)
                    # 2 is a 2.0, and of Gemma 1's two names of the activation one is enough
                    assert name not in values or change == 2 or name == "hidden_act", (name, change)
                else:
                    plain = plain_text_config(values)
                    own = transformers_text_config(values, tmp_path)
                    assert same(architecture_of(own, family), architecture_of(config, family)), (name, change)
                    filled += 1
                    if plain is not None:
                        assert missing_features(features_of(config, family), FEATURES) is None, (name, change)
                        assert same(architecture_of(plain, family), architecture_of(config, family)), (name, change)
                        agreed += 1
            section[name] = value
    assert agreed > 20
    assert filled > agreed
    assert refused > 20


@pytest.mark.parametrize("raw", [GEMMA_7B, GEMMA3_270M, GEMMA3_4B_IT])
def test_released_configs_need_no_transformers(raw: dict[str, Any], tmp_path: Path) -> None:
    """Gemma 3 4B leaves most values out, and its full layers have a scaled rope."""
    family = family_of(raw["model_type"])
    plain = plain_text_config(values_of(raw))
    assert plain is not None
    assert same(architecture_of(plain, family), architecture_of(theirs(raw, tmp_path), family))


@pytest.mark.parametrize("model_type", KINDS)
def test_a_config_that_says_nothing_is_transformers_default(model_type: str, tmp_path: Path) -> None:
    family = FAMILIES_BY_TYPE[model_type]
    theirs = getattr(transformers, family.config_class)()
    plain = plain_text_config(text_values({"model_type": model_type}, family, tmp_path, theirs.num_hidden_layers))
    if family.heads_per_kind:  # whose full layers' heads are not guessed
        assert plain is None
    else:
        assert same(architecture_of(plain, family), architecture_of(theirs, family))


@pytest.mark.parametrize("raw", [GEMMA_7B, GEMMA_2B, GEMMA3_270M, GEMMA3_4B_IT])
def test_released_configs_are_read_as_transformers_reads_them(raw: dict[str, Any], tmp_path: Path) -> None:
    family = family_of(raw["model_type"])
    ours, config = transformers_text_config(values_of(raw), tmp_path), theirs(raw, tmp_path)
    read = KINDS[ours.model_type].keys() & ours.to_dict().keys()
    assert len(read) >= 15
    for name in read:
        assert getattr(ours, name) == getattr(config, name), name
    assert same(architecture_of(ours, family), architecture_of(config, family))


def test_a_checkpoints_dtype_is_transformers(checkpoints: Callable[[str], Path]) -> None:
    from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint

    for kind in FAMILIES:
        checkpoint = Checkpoint(checkpoints(kind))
        config = AutoConfig.from_pretrained(checkpoints(kind))
        assert checkpoint.dtype == (config.get_text_config().dtype or config.dtype) == torch.bfloat16
