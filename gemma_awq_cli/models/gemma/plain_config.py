"""A Gemma's text config from config.json alone, if the file states everything that a forward of our own must know.

transformers takes a second to import and fills in the values that a config leaves out. Where a value is left out or
unusual, nothing is guessed here: the answer is None, and transformers reads the file.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from gemma_awq_cli.models.gemma.families import FAMILIES, FULL, SLIDING, Family
from gemma_awq_cli.models.gemma.features import ACTIVATION

_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings", "bos_token_id",
)  # fmt: skip
_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")


def plain_text_config(section: Mapping[str, Any]) -> SimpleNamespace | None:
    """Return the values of a config.json that layers.py and architecture.py read, under transformers' names.

    None: ask transformers. section: the result of `config_values.text_values`.
    """
    family = FAMILIES[section["model_type"]]
    usual = (
        section.get(family.activation_key) == ACTIVATION
        and section.get("attention_bias") is False
        and not section.get("use_bidirectional_attention")
        and all(_is_size(section.get(name)) for name in _SIZES)
        and section.get("hidden_size", 0) % section.get("num_attention_heads", 1) == 0
        and isinstance(section.get("rms_norm_eps"), float)
        and isinstance(section.get("tie_word_embeddings", True), bool)
    )
    if not usual:
        return None
    found: dict[str, Any] = {
        name: section[name] for name in (*_SIZES, "attention_bias", "rms_norm_eps", family.activation_key)
    }
    found["tie_word_embeddings"] = section.get("tie_word_embeddings", True)
    if len(family.layer_kinds) > 1:
        types = section.get("layer_types")
        known = (
            isinstance(types, list)
            and len(types) == section["num_hidden_layers"]
            and set(types) <= set(family.layer_kinds)
        )
        known = known and _is_size(section.get("sliding_window")) and _is_size(section.get("query_pre_attn_scalar"))
        caps = [section.get(name, False) for name in _CAPS]
        if not known or not all(cap is None or isinstance(cap, float) for cap in caps):
            return None
        found |= {name: section[name] for name in ("layer_types", "sliding_window", "query_pre_attn_scalar", *_CAPS)}
    rope = _rope_parameters(section, family)
    return None if rope is None else SimpleNamespace(**found, rope_parameters=rope)


def _rope_parameters(section: Mapping[str, Any], family: Family) -> dict[str, Any] | None:
    """The parameters of plain rotary embeddings in the form of transformers 5; None for any other kind."""
    if section.get("rope_scaling") is not None or "partial_rotary_factor" in section:
        return None
    parameters = section.get("rope_parameters")
    if parameters is None:  # as transformers 4 wrote it
        thetas = {FULL: section.get("rope_theta"), SLIDING: section.get("rope_local_base_freq")}
        parameters = {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in thetas.items()}
        parameters = parameters if family.rope_per_kind else parameters[FULL]
    if not isinstance(parameters, dict):
        return None
    if family.rope_per_kind and set(parameters) != set(family.layer_kinds):
        return None
    plain = all(
        isinstance(one, dict)
        and set(one) == {"rope_type", "rope_theta"}
        and one["rope_type"] == "default"
        and _is_number(one["rope_theta"])
        for one in (parameters.values() if family.rope_per_kind else [parameters])
    )
    return parameters if plain else None


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
