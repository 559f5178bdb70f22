"""A Gemma's text config from config.json and the defaults alone, if the file says nothing unusual.

transformers takes a second to import. Where a value is unusual, nothing is guessed here: the answer is None, and
transformers reads the file.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from gemma_awq_cli.models.gemma.config_defaults import rope_parameters_of, with_all_defaults
from gemma_awq_cli.models.gemma.families import FAMILIES
from gemma_awq_cli.models.gemma.family import FULL, Family
from gemma_awq_cli.models.gemma.features import ACTIVATION

_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings", "bos_token_id",
)  # fmt: skip
_LAYERS = ("layer_types", "sliding_window", "final_logit_softcapping")
_GEMMA2 = (*_LAYERS, "query_pre_attn_scalar", "attn_logit_softcapping")
_PER_LAYER_INPUTS = ("vocab_size_per_layer_input", "hidden_size_per_layer_input", "num_kv_shared_layers")
_EXPERTS = ("num_experts", "top_k_experts", "moe_intermediate_size")
# By the family's `text_type`: the values that a forward needs beside those of every family.
_NEEDED: Mapping[str, tuple[str, ...]] = {
    "gemma": (),
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "vaultgemma": _GEMMA2,
    "gemma3n_text": (
        *_LAYERS, *_PER_LAYER_INPUTS, "activation_sparsity_pattern", "laurel_rank", "altup_num_inputs",
        "altup_active_idx", "altup_correct_scale",
    ),
    "gemma4_text": (
        *_LAYERS, *_PER_LAYER_INPUTS, *_EXPERTS, "attention_k_eq_v", "use_double_wide_mlp", "enable_moe_block"
    ),
    "gemma4_unified_text": (*_LAYERS, "attention_k_eq_v", "num_kv_shared_layers", "use_double_wide_mlp"),
}  # fmt: skip
_OWN_HEADS = ("per_layer_config", "global_head_dim")  # either says how the heads of full layers differ
_MAY_BE_NULL = ("final_logit_softcapping", "attn_logit_softcapping", *_EXPERTS)


def plain_text_config(stated: Mapping[str, Any]) -> SimpleNamespace | None:
    """Return the values of a config.json that layers.py and architecture.py read, under transformers' names.

    None: ask transformers. stated: the result of `config_values.text_values`.
    """
    family = FAMILIES[stated["model_type"]]
    section = with_all_defaults(stated)
    needed = (*_SIZES, "attention_bias", "rms_norm_eps", family.activation_key, *_NEEDED[family.text_type])
    usual = (
        all(section[name] is not None or name in _MAY_BE_NULL for name in needed)
        and section.get(family.activation_key) == ACTIVATION
        and section.get("attention_bias") is False
        and section.get("use_bidirectional_attention") in (None, False, "vision")
        and section.get("hidden_size", 0) % section.get("num_attention_heads", 1) == 0
    )
    if not usual:
        return None
    types = section.get("layer_types")
    if types is not None and not set(types) <= set(family.layer_kinds):
        return None
    found: dict[str, Any] = {name: section[name] for name in needed}
    found["tie_word_embeddings"] = section.get("tie_word_embeddings", True)
    if family.heads_per_kind:
        told = any(stated.get(name) is not None for name in _OWN_HEADS)
        sizes = _sizes_per_layer(section) if told else None
        if sizes is None:
            return None
        found["per_layer_config"] = sizes
    rope = _rope_parameters(section, family)
    return None if rope is None else SimpleNamespace(**found, rope_parameters=rope)


def _sizes_per_layer(section: Mapping[str, Any]) -> list[SimpleNamespace] | None:
    """The heads of each layer: the full ones have their own. None where transformers changes what the config says."""
    types = section["layer_types"]
    if types[-1] != FULL:
        return None
    own, other = section.get("per_layer_config"), section.get("global_head_dim")
    sizes = {"head_dim": section["head_dim"], "num_key_value_heads": section["num_key_value_heads"]}
    if own is None:
        kv_heads = section.get("num_global_key_value_heads") if section["attention_k_eq_v"] else None
        full = {"head_dim": other, **({} if kv_heads is None else {"num_key_value_heads": kv_heads})}
        own = {str(index): full for index, kind in enumerate(types) if kind == FULL}
    return [SimpleNamespace(**{**sizes, **own.get(str(index), {})}) for index in range(len(types))]


def _rope_parameters(section: Mapping[str, Any], family: Family) -> dict[str, Any] | None:
    """The parameters of plain rotary embeddings in the form of transformers 5; None for any other kind."""
    parameters = section.get("rope_parameters")
    scaling = section.get("rope_scaling")
    if "partial_rotary_factor" in section or (scaling is not None and parameters is not None):
        return None
    if parameters is None:  # as transformers 4 wrote it, or not at all
        parameters = rope_parameters_of(section, family)
    if not isinstance(parameters, dict):
        return None
    if family.rope_per_kind and set(parameters) != set(family.layer_kinds):
        return None
    plain = all(_is_plain(one) for one in (parameters.values() if family.rope_per_kind else [parameters]))
    return parameters if plain else None


def _is_plain(parameters: Any) -> bool:
    """Whether these are the parameters of a rotary embedding that rotary.py computes by itself."""
    if not isinstance(parameters, dict) or not _is_number(parameters.get("rope_theta")):
        return False
    names = {
        "default": {"rope_type", "rope_theta"},
        "linear": {"rope_type", "rope_theta", "factor"},
        "proportional": {"rope_type", "rope_theta", "partial_rotary_factor"},
    }
    return set(parameters) == names.get(parameters.get("rope_type", ""), set())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
