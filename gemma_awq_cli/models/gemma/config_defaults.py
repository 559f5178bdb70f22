"""The values that a config.json leaves out, as transformers fills them in, without importing it.

The released Gemma 3 4B, 12B and 27B state five values of their language models and leave the others out.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from gemma_awq_cli.models.gemma.families import FAMILIES
from gemma_awq_cli.models.gemma.family import FULL, SLIDING, Family
from gemma_awq_cli.models.gemma.features import ACTIVATION

_EVERY_FAMILY = {
    "hidden_size": 2304, "intermediate_size": 9216, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 256, "attention_bias": False, "bos_token_id": 2, "tie_word_embeddings": True,
}  # fmt: skip
_GEMMA2 = {**_EVERY_FAMILY, "vocab_size": 256000, "max_position_embeddings": 8192, "sliding_window": 4096}
_GEMMA4 = {
    **_EVERY_FAMILY, "vocab_size": 262144, "max_position_embeddings": 131072, "sliding_window": 512,
    "global_head_dim": 512, "attention_k_eq_v": False, "num_kv_shared_layers": 0, "use_double_wide_mlp": False,
}  # fmt: skip
# By the family's `text_type`.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "gemma": {
        **_EVERY_FAMILY, "hidden_size": 3072, "intermediate_size": 24576, "num_attention_heads": 16,
        "num_key_value_heads": 16, "vocab_size": 256000, "max_position_embeddings": 8192,
    },
    "gemma2": _GEMMA2,
    "gemma3_text": {
        **_EVERY_FAMILY, "vocab_size": 262208, "max_position_embeddings": 131072, "sliding_window": 4096,
    },
    "vaultgemma": _GEMMA2,
    "gemma3n_text": {
        **_EVERY_FAMILY, "hidden_size": 2048, "intermediate_size": 16384, "num_key_value_heads": 2,
        "vocab_size": 262400, "max_position_embeddings": 32768, "sliding_window": 512,
        "vocab_size_per_layer_input": 262144, "hidden_size_per_layer_input": 256, "num_kv_shared_layers": 15,
        "laurel_rank": 64, "altup_num_inputs": 4, "altup_active_idx": 0, "altup_correct_scale": True,
    },
    "gemma4_text": {
        **_GEMMA4, "vocab_size_per_layer_input": 262144, "hidden_size_per_layer_input": 256,
        "enable_moe_block": False, "num_experts": None, "top_k_experts": None, "moe_intermediate_size": None,
    },
    "gemma4_unified_text": {**_GEMMA4, "max_position_embeddings": 262144, "sliding_window": 1024},
}  # fmt: skip
# What a forward needs beside that, the activation of each family apart.
_SOFTCAPS = {"query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
_FORWARD: Mapping[str, Mapping[str, Any]] = {
    "gemma2": _SOFTCAPS,
    "gemma3_text": {**_SOFTCAPS, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    "vaultgemma": _SOFTCAPS,
    "gemma3n_text": {"final_logit_softcapping": 30.0},
    "gemma4_text": {"final_logit_softcapping": None},
    "gemma4_unified_text": {"final_logit_softcapping": None},
}
_PROPORTIONAL = {"rope_type": "proportional", "partial_rotary_factor": 0.25}
_ROPES: Mapping[str, Mapping[str, Any]] = {  # of the full layers, where they are not the default kind
    "gemma4_text": _PROPORTIONAL, "gemma4_unified_text": _PROPORTIONAL,
}  # fmt: skip
_THETA, _FULL_THETA = 10_000.0, 1_000_000.0  # the latter where full layers have a rope of their own
_LAYERS = {
    "gemma": 28, "gemma2": 26, "gemma3_text": 26, "vaultgemma": 26, "gemma3n_text": 35, "gemma4_text": 30,
    "gemma4_unified_text": 30,
}  # fmt: skip
# Every n-th layer is a full one, the others are sliding.
_PERIOD = {
    "gemma2": 2, "gemma3_text": 6, "vaultgemma": 2, "gemma3n_text": 5, "gemma4_text": 6, "gemma4_unified_text": 6,
}  # fmt: skip
_NO_ROPE: Mapping[str, Any] = {"rope_theta": 10000.0}


def with_defaults(values: Mapping[str, Any], layers: int) -> SimpleNamespace:
    """Return `config_values.text_values` with the sizes that it lacks, for `shape_of`. layers: where it lacks those.

    The rotary parameters are placeholders.
    """
    model_type = values["model_type"]
    family = FAMILIES[model_type]
    given = {name: value for name, value in values.items() if value is not None}
    facts = {**_DEFAULTS[model_type], "num_hidden_layers": layers or _LAYERS[model_type], **given}
    count = facts["num_hidden_layers"]
    if len(family.layer_kinds) > 1:
        facts["layer_types"] = list(facts.get("layer_types", _kinds_of_layers(facts)))
    if family.heads_per_kind:
        facts["layer_types"][-1] = FULL
        facts["per_layer_config"] = _heads_per_layer(facts)
    if model_type == "gemma3n_text":
        facts.setdefault("activation_sparsity_pattern", _sparsity(count))
    facts["rope_parameters"] = dict.fromkeys(family.layer_kinds, _NO_ROPE) if family.rope_per_kind else _NO_ROPE
    return SimpleNamespace(**facts)


def with_all_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `config_values.text_values` with everything that it lacks, under transformers' names.

    A value that is null stays null. `per_layer_config` and Gemma 3's `rope_scaling` are left as they are.
    """
    model_type = values["model_type"]
    family = FAMILIES[model_type]
    found = {
        **_DEFAULTS[model_type], **_FORWARD.get(model_type, {}), "num_hidden_layers": _LAYERS[model_type],
        "rms_norm_eps": 1e-6, family.activation_key: ACTIVATION, **values,
    }  # fmt: skip
    if len(family.layer_kinds) > 1 and "layer_types" not in values:
        found["layer_types"] = _kinds_of_layers(found)
        if family.heads_per_kind:
            found["layer_types"][-1] = FULL
    if model_type == "gemma3n_text":
        found.setdefault("activation_sparsity_pattern", _sparsity(found["num_hidden_layers"]))
    return found


def rope_parameters_of(values: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Return the rotary parameters of a config that has none in transformers 5's form, as transformers makes them.

    values: see `with_all_defaults`.
    """
    full = values.get("rope_theta", _FULL_THETA if family.rope_per_kind else _THETA)
    kind = _ROPES.get(family.text_type, {"rope_type": "default"})
    parameters = {**kind, "rope_theta": full, **(values.get("rope_scaling") or {})}
    if not family.rope_per_kind:
        return parameters
    local = {"rope_type": "default", "rope_theta": values.get("rope_local_base_freq", _THETA)}
    return {SLIDING: local, FULL: parameters}


def _kinds_of_layers(facts: Mapping[str, Any]) -> list[str]:
    period = facts.get("sliding_window_pattern", _PERIOD[facts["model_type"]])
    return [SLIDING if index % period else FULL for index in range(1, facts["num_hidden_layers"] + 1)]


def _sparsity(layers: int) -> list[float]:
    sparse = 10 if layers > 10 else 0
    return [0.95] * sparse + [0.0] * (layers - sparse)


def _heads_per_layer(facts: Mapping[str, Any]) -> list[SimpleNamespace]:
    sizes = {name: facts[name] for name in ("head_dim", "num_key_value_heads")}
    own = facts.get("per_layer_config")
    if own is None:
        kv_heads = facts.get("num_global_key_value_heads") if facts["attention_k_eq_v"] else None
        full = {"head_dim": facts["global_head_dim"]}
        full |= {} if kv_heads is None else {"num_key_value_heads": kv_heads}
        own = {str(index): full for index, kind in enumerate(facts["layer_types"]) if kind == FULL}
    return [SimpleNamespace(**{**sizes, **own.get(str(index), {})}) for index in range(len(facts["layer_types"]))]
