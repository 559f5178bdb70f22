"""The sizes that a config.json leaves out, as transformers fills them in, without importing it.

Only what decides the shapes of the tensors: enough to say which tensors a model has, not to run it.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from gemma_awq_cli.models.gemma.families import FAMILIES
from gemma_awq_cli.models.gemma.family import FULL, SLIDING

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
        period = facts.get("sliding_window_pattern", _PERIOD[model_type])
        kinds = [SLIDING if index % period else FULL for index in range(1, count + 1)]
        facts["layer_types"] = list(facts.get("layer_types", kinds))
    if family.heads_per_kind:
        facts["layer_types"][-1] = FULL
        facts["per_layer_config"] = _heads_per_layer(facts)
    if model_type == "gemma3n_text":
        sparse = 10 if count > 10 else 0
        facts.setdefault("activation_sparsity_pattern", [0.95] * sparse + [0.0] * (count - sparse))
    facts["rope_parameters"] = dict.fromkeys(family.layer_kinds, _NO_ROPE) if family.rope_per_kind else _NO_ROPE
    return SimpleNamespace(**facts)


def _heads_per_layer(facts: Mapping[str, Any]) -> list[SimpleNamespace]:
    sizes = {name: facts[name] for name in ("head_dim", "num_key_value_heads")}
    own = facts.get("per_layer_config")
    if own is None:
        kv_heads = facts.get("num_global_key_value_heads") if facts["attention_k_eq_v"] else None
        full = {"head_dim": facts["global_head_dim"]}
        full |= {} if kv_heads is None else {"num_key_value_heads": kv_heads}
        own = {str(index): full for index, kind in enumerate(facts["layer_types"]) if kind == FULL}
    return [SimpleNamespace(**{**sizes, **own.get(str(index), {})}) for index in range(len(facts["layer_types"]))]
