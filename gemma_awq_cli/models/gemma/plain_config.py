"""A Gemma's text config from config.json itself, where it says all that a forward of our own must know.

transformers takes a second to import and fills in what a config leaves out. Where something is left out or unusual,
nothing is guessed here: the answer is None, and transformers reads the file.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings", "bos_token_id",
)  # fmt: skip
_ACTIVATION = "gelu_pytorch_tanh"
_LAYER_TYPES = {"sliding_attention", "full_attention"}
_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")


def plain_text_config(section: Mapping[str, Any]) -> SimpleNamespace | None:
    """What architecture.py reads, under transformers' names, of the values of a config.json; None: ask transformers.

    section: what `config_values.text_values` found sound.
    """
    first = section.get("model_type") == "gemma"
    activation = section.get("hidden_activation") or section.get("hidden_act" if first else "hidden_activation")
    usual = (
        activation == _ACTIVATION
        and section.get("attention_bias") is False
        and not section.get("use_bidirectional_attention")
        and section.get("model_type") in ("gemma", "gemma2", "gemma3_text")
        and all(_is_size(section.get(name)) for name in _SIZES)
        and section.get("hidden_size", 0) % section.get("num_attention_heads", 1) == 0
        and isinstance(section.get("rms_norm_eps"), float)
        and isinstance(section.get("tie_word_embeddings", True), bool)
    )
    if not usual:
        return None
    found: dict[str, Any] = {name: section[name] for name in (*_SIZES, "attention_bias", "rms_norm_eps")}
    found |= {"hidden_activation": activation, "tie_word_embeddings": section.get("tie_word_embeddings", True)}
    if not first:
        types = section.get("layer_types")
        known = isinstance(types, list) and len(types) == section["num_hidden_layers"] and set(types) <= _LAYER_TYPES
        known = known and _is_size(section.get("sliding_window")) and _is_size(section.get("query_pre_attn_scalar"))
        caps = [section.get(name, False) for name in _CAPS]
        if not known or not all(cap is None or isinstance(cap, float) for cap in caps):
            return None
        found |= {name: section[name] for name in ("layer_types", "sliding_window", "query_pre_attn_scalar", *_CAPS)}
    rope = _rope_parameters(section)
    return None if rope is None else SimpleNamespace(**found, rope_parameters=rope)


def _rope_parameters(section: Mapping[str, Any]) -> dict[str, Any] | None:
    """Plain rotary frequencies in the form of transformers 5; None for any other kind."""
    if section.get("rope_scaling") is not None or "partial_rotary_factor" in section:
        return None
    by_type = section["model_type"] == "gemma3_text"
    parameters = section.get("rope_parameters")
    if parameters is None:  # as transformers 4 wrote it
        thetas = {"full_attention": section.get("rope_theta"), "sliding_attention": section.get("rope_local_base_freq")}
        parameters = {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in thetas.items()}
        parameters = parameters if by_type else parameters["full_attention"]
    if not isinstance(parameters, dict):
        return None
    if by_type and set(parameters) != _LAYER_TYPES:
        return None
    plain = all(
        isinstance(one, dict)
        and set(one) == {"rope_type", "rope_theta"}
        and one["rope_type"] == "default"
        and _is_number(one["rope_theta"])
        for one in (parameters.values() if by_type else [parameters])
    )
    return parameters if plain else None


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
