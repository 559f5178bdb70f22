"""The values of config.json that describe the language model, checked for type and bounds before anything uses them.

Only the values that are named here are read, by transformers too: everything else in a config changes nothing.
Bounds come from the tensors where possible; the rest are limits of the arithmetic. Nothing here allocates.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.gemma.family import FULL, SLIDING, Family

HINT = "Take the config.json of the original model."
LAYER_TYPES = (SLIDING, FULL)
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")
ACTIVATIONS = (
    "gelu_pytorch_tanh", "gelu", "gelu_new", "gelu_fast", "gelu_python", "quick_gelu", "silu", "swish", "relu", "relu2",
    "mish", "tanh",
)  # fmt: skip
MAX_SIZE = 2**31 - 1
MAX_LAYERS = 1024
MAX_EXPERTS = 1024
MAX_STREAMS = 64
MAX_CONTEXT = 2**24  # positions are float32, which cannot count one by one beyond this


@dataclass(frozen=True)
class Kind:
    """A kind of value.

    what: in words, after "it must be"; accepts: whether a JSON value is of the kind; real: whether to store a float.
    """

    what: str
    accepts: Callable[[Any], bool]
    real: bool = False


def whole(low: int, high: int) -> Kind:
    # type(), not isinstance(): JSON's true is not a number
    return Kind(f"a whole number from {low} to {high}", lambda value: type(value) is int and low <= value <= high)


def number(low: float, high: float) -> Kind:
    return Kind(f"a number from {low:g} to {high:g}", lambda v: type(v) in (int, float) and low <= v <= high, real=True)


def one_of(names: Iterable[str]) -> Kind:
    names = tuple(names)
    return Kind("one of " + ", ".join(names), lambda value: isinstance(value, str) and value in names)


def optional(kind: Kind) -> Kind:
    return Kind(f"{kind.what}, or null", lambda value: value is None or kind.accepts(value), kind.real)


def either(one: Kind, other: Kind) -> Kind:
    return Kind(f"{one.what} or {other.what}", lambda value: one.accepts(value) or other.accepts(value))


def list_of(kind: Kind) -> Kind:
    return Kind(
        f"a list, each entry {kind.what}",
        lambda value: isinstance(value, list) and len(value) <= MAX_SIZE and all(map(kind.accepts, value)),
        kind.real,
    )


BOOL = Kind("true or false", lambda value: isinstance(value, bool))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
SIZE = whole(1, MAX_SIZE)
THETA = number(1, 1e15)
SOFTCAP = optional(number(1e-3, 1e6))

_SIZES: Mapping[str, Kind] = {
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_hidden_layers": whole(1, MAX_LAYERS),
    "num_attention_heads": SIZE,
    "num_key_value_heads": SIZE,
    "head_dim": whole(2, MAX_SIZE),
    "vocab_size": SIZE,
    "max_position_embeddings": whole(1, MAX_CONTEXT),
    "rms_norm_eps": number(1e-30, 1),
    "bos_token_id": optional(whole(0, MAX_SIZE)),
    "attention_bias": BOOL,
    "tie_word_embeddings": BOOL,
    "rope_parameters": optional(OBJECT),
}
_EVERY_FAMILY: Mapping[str, Kind] = {
    **_SIZES,
    "original_max_position_embeddings": whole(1, MAX_CONTEXT),
    "use_bidirectional_attention": optional(BOOL),
    "rope_theta": THETA,
    "rope_scaling": optional(OBJECT),
    "partial_rotary_factor": optional(number(1e-3, 1)),
}
_FROM_GEMMA2: Mapping[str, Kind] = {
    "hidden_activation": one_of(ACTIVATIONS),
    "query_pre_attn_scalar": SIZE,
    "sliding_window": optional(SIZE),
    "layer_types": optional(list_of(one_of(LAYER_TYPES))),
    "final_logit_softcapping": SOFTCAP,
    "attn_logit_softcapping": SOFTCAP,
}
_PER_LAYER_INPUTS: Mapping[str, Kind] = {
    "vocab_size_per_layer_input": SIZE,
    "hidden_size_per_layer_input": whole(0, MAX_SIZE),
    "num_kv_shared_layers": whole(0, MAX_LAYERS),
}
_GEMMA4: Mapping[str, Kind] = {
    **_SIZES,
    "hidden_activation": one_of(ACTIVATIONS),
    "sliding_window": SIZE,
    "layer_types": optional(list_of(one_of(LAYER_TYPES))),
    "final_logit_softcapping": SOFTCAP,
    "use_bidirectional_attention": optional(one_of(("all", "vision"))),
    "attention_k_eq_v": BOOL,
    "num_kv_shared_layers": whole(0, MAX_LAYERS),
    "use_double_wide_mlp": BOOL,
    # of the full layers; transformers 5 writes them as `per_layer_config`
    "global_head_dim": whole(2, MAX_SIZE),
    "num_global_key_value_heads": optional(SIZE),
    "per_layer_config": optional(OBJECT),
}
KINDS: Mapping[str, Mapping[str, Kind]] = {
    "gemma": {
        **_EVERY_FAMILY,
        "hidden_act": optional(one_of(ACTIVATIONS)),
        "hidden_activation": optional(one_of(ACTIVATIONS)),
    },
    "gemma2": {**_EVERY_FAMILY, **_FROM_GEMMA2},
    "gemma3_text": {
        **_EVERY_FAMILY,
        **_FROM_GEMMA2,
        "rope_local_base_freq": THETA,
        "sliding_window_pattern": whole(1, MAX_SIZE),
    },
    "vaultgemma": {**_EVERY_FAMILY, **_FROM_GEMMA2},
    "gemma3n_text": {
        **_EVERY_FAMILY,
        **_PER_LAYER_INPUTS,
        "hidden_size_per_layer_input": SIZE,
        "intermediate_size": either(SIZE, list_of(SIZE)),
        "hidden_activation": one_of(ACTIVATIONS),
        "sliding_window": SIZE,
        "layer_types": optional(list_of(one_of(LAYER_TYPES))),
        "final_logit_softcapping": number(1e-3, 1e6),
        "rope_local_base_freq": THETA,
        "activation_sparsity_pattern": optional(list_of(number(0, 0.9999))),
        "laurel_rank": SIZE,
        "altup_num_inputs": whole(2, MAX_STREAMS),
        "altup_active_idx": whole(0, MAX_STREAMS - 1),
        "altup_correct_scale": BOOL,
    },
    "gemma4_text": {
        **_GEMMA4,
        **_PER_LAYER_INPUTS,
        "enable_moe_block": BOOL,
        "num_experts": optional(whole(1, MAX_EXPERTS)),
        "top_k_experts": optional(whole(1, MAX_EXPERTS)),
        "moe_intermediate_size": optional(SIZE),
    },
    "gemma4_unified_text": _GEMMA4,
}
_PER_LAYER: Mapping[str, Kind] = {"head_dim": whole(2, MAX_SIZE), "num_key_value_heads": SIZE}
_FACTORS = list_of(number(1e-6, 1e6))
_ROPE: Mapping[str, Kind] = {
    "rope_type": one_of(ROPE_TYPES),
    "type": one_of(ROPE_TYPES),  # the older name
    "rope_theta": THETA,
    "factor": number(1e-3, 1e6),
    "partial_rotary_factor": number(1e-3, 1),
    "original_max_position_embeddings": whole(1, MAX_CONTEXT),
    "attention_factor": optional(number(1e-3, 1e3)),
    "beta_fast": optional(number(1e-3, 1e6)),
    "beta_slow": optional(number(1e-3, 1e6)),
    "mscale": optional(number(1e-3, 1e3)),
    "mscale_all_dim": optional(number(1e-3, 1e3)),
    "truncate": BOOL,
    "short_factor": _FACTORS,
    "long_factor": _FACTORS,
    "low_freq_factor": number(1e-3, 1e6),
    "high_freq_factor": number(1e-3, 1e6),
}
_TOWER: Mapping[str, Kind] = {
    "num_hidden_layers": whole(1, MAX_LAYERS),
    **dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads"), SIZE),
}
_EMBEDDER: Mapping[str, Kind] = {"hidden_size": SIZE, "vocab_size": SIZE}
_CHANNELS = list_of(SIZE)
# What is read of the sections that describe a multimodal model's other parts, by the language model's model_type.
_COMPANIONS: Mapping[str, Mapping[str, Mapping[str, Kind]]] = {
    "gemma3_text": {
        "vision_config": {"model_type": one_of(["siglip_vision_model"]), **_TOWER, "num_channels": SIZE},
    },
    "gemma3n_text": {
        "vision_config": {"model_type": one_of(["gemma3n_vision"]), **_EMBEDDER},
        "audio_config": {
            "model_type": one_of(["gemma3n_audio"]),
            **_EMBEDDER,
            "conf_num_hidden_layers": whole(1, MAX_LAYERS),
            **dict.fromkeys(("input_feat_size", "conf_num_attention_heads", "conf_conv_kernel_size"), SIZE),
            "sscp_conv_channel_size": _CHANNELS,
        },
    },
    "gemma4_text": {
        "vision_config": {
            "model_type": one_of(["gemma4_vision"]),
            **_TOWER,
            **dict.fromkeys(
                ("num_key_value_heads", "head_dim", "patch_size", "pooling_kernel_size", "position_embedding_size"),
                SIZE,
            ),
        },
        "audio_config": {
            "model_type": one_of(["gemma4_audio"]),
            **_TOWER,
            **dict.fromkeys(("conv_kernel_size", "output_proj_dims"), SIZE),
            "subsampling_conv_channels": _CHANNELS,
        },
    },
    "gemma4_unified_text": {
        "vision_config": {
            "model_type": one_of(["gemma4_unified_vision"]),
            **dict.fromkeys(
                ("patch_size", "pooling_kernel_size", "mm_embed_dim", "mm_posemb_size", "output_proj_dims"), SIZE
            ),
        },
        "audio_config": {
            "model_type": one_of(["gemma4_unified_audio"]),
            **dict.fromkeys(("audio_embed_dim", "hidden_size", "output_proj_dims"), SIZE),
        },
    },
}
_UNREAD = {"num_labels": whole(0, 100_000)}  # not used here, but transformers makes a list of this length
# The values, beside the heads', that change what the model computes without changing the shapes of its weights.
FUNCTION = (
    "model_type", "hidden_act", "hidden_activation", "rms_norm_eps", "rope_parameters", "sliding_window",
    "layer_types", "query_pre_attn_scalar",
    "attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention", "attention_k_eq_v",
    "num_kv_shared_layers", "top_k_experts", "activation_sparsity_pattern", "altup_active_idx", "altup_correct_scale",
)  # fmt: skip


def text_values(config: Mapping[str, Any], family: Family, where: Path, layers: int) -> dict[str, Any]:
    """Return the language model's checked values of a config.json under their own names, `model_type` among them.

    where: the file, for errors; layers: how many decoder layers the tensors have.
    """
    model_type = family.text_type
    section: Any = config
    prefix = ""
    if family.text_section is not None:
        section, prefix = config.get(family.text_section), f"{family.text_section}."
        section = {} if section is None else section
        _require(where, family.text_section, section, OBJECT)
        _require_companions(where, config, _COMPANIONS[model_type])
        own = section.get("model_type", model_type)
        _require(where, f"{prefix}model_type", own, one_of([model_type]))
    _require_known_forward(where, prefix, section, KINDS[model_type])
    _checked(where, "", config, _UNREAD)
    _checked(where, prefix, section, _UNREAD)
    values = _checked(where, prefix, section, KINDS[model_type])
    for name in ("rope_scaling", "rope_parameters"):
        if values.get(name) is not None:
            values[name] = _rope(where, f"{prefix}{name}", values[name], family)
    if family.activation_key == "hidden_act":
        _settle_activation(where, prefix, values)
    if values.get("num_hidden_layers", layers) != layers:
        raise GemmaAwqError(
            f"{where}: {prefix}num_hidden_layers is {values['num_hidden_layers']}; the tensors have {layers} layers.",
            "Take config.json and the weights from the same checkpoint.",
        )
    for name in ("layer_types", "intermediate_size", "activation_sparsity_pattern"):
        given = values.get(name)
        if isinstance(given, list) and len(given) != layers:
            raise GemmaAwqError(f"{where}: {prefix}{name} has {len(given)} entries for {layers} layers.", HINT)
    if values.get("per_layer_config") is not None:
        values["per_layer_config"] = _per_layer(where, prefix, values)
    return {"model_type": model_type, **values}


def require_sound(facts: Any, family: Family, where: Path) -> None:
    """An error unless values that depend on each other agree, those that config.json leaves out included."""

    def require(sound: bool, problem: str) -> None:
        if not sound:
            raise GemmaAwqError(f"{where}: {problem}.", HINT)

    heads = facts.num_attention_heads
    for sizes in _sizes_by_kind(facts, family):
        kv_heads = sizes.num_key_value_heads
        require(
            heads % kv_heads == 0, f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
        require(sizes.head_dim % 2 == 0, f"head_dim {sizes.head_dim} is odd, but the rotary embedding rotates pairs")
    if facts.bos_token_id is not None:
        bos, entries = facts.bos_token_id, facts.vocab_size
        require(bos < entries, f"bos_token_id {bos} is not below vocab_size {entries}")
    for kind in dict.fromkeys(facts.layer_types) if family.rope_per_kind else ():
        own = (facts.rope_parameters or {}).get(kind)
        require(isinstance(own, dict) and "rope_theta" in own, f"rope_parameters has no rope_theta for {kind}")
    if SLIDING in (getattr(facts, "layer_types", None) or ()):
        require(facts.sliding_window is not None, "layer_types has sliding layers, but sliding_window is null")
    if shared := getattr(facts, "num_kv_shared_layers", 0):
        own = facts.layer_types[: max(0, len(facts.layer_types) - shared)]
        missing = sorted(set(facts.layer_types) - set(own))
        require(
            not missing, f"num_kv_shared_layers is {shared}, which leaves no {', '.join(missing)} layer to share from"
        )
    if getattr(facts, "enable_moe_block", False):
        for name in ("num_experts", "top_k_experts", "moe_intermediate_size"):
            require(getattr(facts, name) is not None, f"enable_moe_block is true, but {name} is null")
        active, count = facts.top_k_experts, facts.num_experts
        require(active <= count, f"top_k_experts {active} is more than num_experts {count}")
    if hasattr(facts, "altup_num_inputs"):
        active, count = facts.altup_active_idx, facts.altup_num_inputs
        require(active < count, f"altup_active_idx {active} is not below altup_num_inputs {count}")
    elif getattr(facts, "hidden_size_per_layer_input", 0):
        table, entries = facts.vocab_size_per_layer_input, facts.vocab_size
        require(table >= entries, f"vocab_size_per_layer_input {table} is less than vocab_size {entries}")


def _sizes_by_kind(facts: Any, family: Family) -> list[Any]:
    """What holds the sizes of the heads of one layer of each kind."""
    if not family.heads_per_kind:
        return [facts]
    return [facts.per_layer_config[facts.layer_types.index(kind)] for kind in set(facts.layer_types)]


def _per_layer(where: Path, prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """What differs between the layers: the heads of the full ones, by the layers' indices."""
    found: dict[str, Any] = {}
    name = f"{prefix}per_layer_config"
    full = [str(index) for index, kind in enumerate(values.get("layer_types") or ()) if kind == FULL]
    for written, own in values["per_layer_config"].items():
        index = written.lstrip("0") or "0"  # transformers pads the indices: 05, 11
        if index not in full or index in found:
            raise GemmaAwqError(f"{where}: {name} has the entry {written[:20]!r}, which is no full layer.", HINT)
        _require(where, f"{name}.{index}", own, OBJECT)
        found[index] = _checked(where, f"{name}.{index}.", own, _PER_LAYER)
        if found[index].keys() != own.keys():
            other = min(own.keys() - found[index].keys())
            raise GemmaAwqError(f"{where}: {name}.{index}.{other[:40]} is not supported for this family.", HINT)
    if found and (found.keys() != set(full) or any(own != found[full[0]] for own in found.values())):
        raise GemmaAwqError(f"{where}: {name} must say the same of every full layer.", HINT)
    return found


def _checked(where: Path, prefix: str, section: Mapping[str, Any], kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """The values of `section` that `kinds` names."""
    values = {}
    for name, kind in kinds.items():
        if name in section:
            value = section[name]
            _require(where, prefix + name, value, kind)
            values[name] = _real(value) if kind.real and value is not None else value
    return values


def _real(value: Any) -> Any:
    return [float(one) for one in value] if isinstance(value, list) else float(value)


def _require(where: Path, name: str, value: Any, kind: Kind) -> None:
    if not kind.accepts(value):
        raise GemmaAwqError(f"{where}: {name} is {_shown(value)}; it must be {kind.what}.", HINT)


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else f"a list of {len(value)}"
    if type(value) is int and abs(value) >= 10**20:
        return f"an integer of {int(math.log10(abs(value))) + 1} digits"
    return json.dumps(value[:80] if isinstance(value, str) else value)


def _require_companions(where: Path, config: Mapping[str, Any], sections: Mapping[str, Mapping[str, Kind]]) -> None:
    """Check the sizes of the towers and embedders. They are copied, never built; readers of the artifact build them."""
    for name, kinds in sections.items():
        if (section := config.get(name)) is not None:
            _require(where, name, section, OBJECT)
            _checked(where, f"{name}.", section, {**kinds, **_UNREAD})


def _require_known_forward(where: Path, prefix: str, section: Mapping[str, Any], kinds: Mapping[str, Kind]) -> None:
    """An error for values that would change transformers' forward and that no Gemma of the family has."""
    if section.get("per_layer_config") is not None and "per_layer_config" not in kinds:
        raise GemmaAwqError(f"{where}: {prefix}per_layer_config is not supported for this family.", HINT)
    if section.get("is_causal", True) is not True:
        raise GemmaAwqError(f"{where}: {prefix}is_causal must be true: text is generated from left to right.", HINT)


def _settle_activation(where: Path, prefix: str, values: dict[str, Any]) -> None:
    """Keep one name of Gemma 1's activation: transformers 4 reads `hidden_activation`, transformers 5 `hidden_act`.

    The first releases say "gelu" and mean the tanh approximation.
    """
    found = {values.pop(name, None) for name in ("hidden_act", "hidden_activation")} - {None}
    found = {"gelu_pytorch_tanh" if name == "gelu" else name for name in found}
    if len(found) > 1:
        raise GemmaAwqError(f"{where}: {prefix}hidden_act and hidden_activation differ.", HINT)
    if found:
        values["hidden_act"] = found.pop()


def _rope(where: Path, name: str, given: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Rotary parameters, or one set of them per layer type, which Gemma 3 has under `rope_parameters`."""
    if family.rope_per_kind and name.endswith("rope_parameters"):
        # GPTQModel writes one set for all beside those of the kinds, which is what transformers reads
        if given.keys() & _ROPE.keys() and not all(isinstance(given.get(kind), dict) for kind in family.layer_kinds):
            raise GemmaAwqError(f"{where}: {name} must hold one object per layer type: {', '.join(LAYER_TYPES)}.", HINT)
        kinds = dict.fromkeys(LAYER_TYPES, optional(OBJECT))
        types = _checked(where, f"{name}.", given, kinds)
        return {kind: None if one is None else _rope_set(where, f"{name}.{kind}", one) for kind, one in types.items()}
    if nested := [kind for kind in LAYER_TYPES if kind in given]:
        raise GemmaAwqError(f"{where}: {name} is one set for all layers; it must not hold {nested[0]}.", HINT)
    return _rope_set(where, name, given)


def _rope_set(where: Path, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    values = _checked(where, f"{name}.", given, _ROPE)
    low, high = values.get("low_freq_factor"), values.get("high_freq_factor")
    if low is not None and high is not None and low >= high:
        raise GemmaAwqError(f"{where}: {name}.high_freq_factor must be greater than low_freq_factor.", HINT)
    return values
