"""config.json as mlx-lm reads it, and which models it can run at all.

mlx-lm has defaults for many values that a config may leave out, and knows the names of transformers 4. So everything
that it looks up is stated here, under its names. Source: mlx-lm 0.32, the `ModelArgs` of `models/gemma*.py`.
"""

from collections.abc import Mapping
from typing import Any

from gemma_awq_cli.export.source_facts import group_size_of
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.stated_config import BITS, stated_config
from gemma_awq_cli.models.gemma.family import FULL, SLIDING
from gemma_awq_cli.models.packed_formats.choosing import SECTION

GROUP_SIZES = (32, 64, 128)  # of MLX's kernels
_SIZES = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "rms_norm_eps", "vocab_size")
_GEMMA2 = (*_SIZES, "num_key_value_heads", "head_dim", "query_pre_attn_scalar")
_PER_LAYER = ("num_kv_shared_layers", "vocab_size_per_layer_input", "hidden_size_per_layer_input")
_GEMMA4 = (
    *_SIZES, "layer_types", "sliding_window", "final_logit_softcapping", "attention_k_eq_v", "num_kv_shared_layers",
    "use_double_wide_mlp", "max_position_embeddings",
)  # fmt: skip
# By `text_type`: the values that mlx-lm reads under transformers' own names.
_STATED: Mapping[str, tuple[str, ...]] = {
    "gemma": (*_SIZES, "num_key_value_heads", "head_dim"),
    "gemma2": (*_GEMMA2, "attn_logit_softcapping", "final_logit_softcapping"),
    "gemma3_text": (*_GEMMA2, "sliding_window", "max_position_embeddings"),
    "gemma3n_text": (
        *_SIZES, *_PER_LAYER, "num_key_value_heads", "head_dim", "layer_types", "sliding_window",
        "max_position_embeddings", "final_logit_softcapping", "activation_sparsity_pattern", "altup_num_inputs",
        "altup_coef_clip", "altup_correct_scale", "altup_active_idx", "laurel_rank",
    ),
    "gemma4_text": (
        *_GEMMA4, "vocab_size_per_layer_input", "hidden_size_per_layer_input", "enable_moe_block", "num_experts",
        "top_k_experts", "moe_intermediate_size",
    ),
    "gemma4_unified_text": _GEMMA4,
}  # fmt: skip
# Families whose module in mlx-lm has another name.
_TYPES = {"gemma4_unified_text": "gemma4_text"}
_ALWAYS_TIED = ("gemma", "gemma2", "gemma3n_text")
_BOTH_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")


def mlx_refusal(checkpoint: Checkpoint, _: Mapping[str, Any]) -> str | None:
    """Return why mlx-lm cannot run the model, as a clause; None if it can."""
    family, config = checkpoint.family, checkpoint.text_config
    if family.text_type not in _STATED:
        return f"mlx-lm has no {family.title}"
    if family.model_type == "gemma3n_text":
        return "mlx-lm reads Gemma 3n in its multimodal form only"
    if (group_size := group_size_of(checkpoint)) not in GROUP_SIZES:
        return f"MLX has groups of 32, 64 and 128, and not of {group_size}"
    if not checkpoint.tied_head and family.text_type in _ALWAYS_TIED:
        return f"mlx-lm's {family.title} has no head besides the embedding"
    if any(linear.bias for layout in checkpoint.shape.layouts for linear in layout.linears.values()):
        return "mlx-lm's Gemma has no biases"
    if family.text_type == "gemma2" and any(getattr(config, name) is None for name in _BOTH_CAPS):
        return "mlx-lm's Gemma 2 always caps scores and logits"
    if family.text_type == "gemma3_text" and config.final_logit_softcapping is not None:
        return "mlx-lm's Gemma 3 does not cap logits"
    if family.text_type == "gemma3_text" and _pattern(checkpoint) is None:
        return "mlx-lm's Gemma 3 needs a full layer after every so many sliding ones"
    return _rope_refusal(checkpoint)


def _rope_refusal(checkpoint: Checkpoint) -> str | None:
    if checkpoint.family.text_type.startswith("gemma4"):
        return None  # it reads the parameters as they are
    linear = ("linear",) if checkpoint.family.text_type == "gemma3_text" else ()
    for layout in checkpoint.shape.layouts:
        scaled = layout.rope.get("rope_type", "default")
        if scaled not in ("default", *(linear if layout.kind == FULL else ())):
            return f"mlx-lm's {checkpoint.family.title} does not scale its rotary embedding this way ({scaled})"
    return None


def mlx_config(checkpoint: Checkpoint, dtype: str, group_size: int) -> dict[str, Any]:
    """Return the whole config.json of the language model. dtype: of the weights that are not packed."""
    section = {"group_size": group_size, "bits": BITS, "mode": "affine"}
    config = stated_config(checkpoint, dtype, None)
    text = _text(checkpoint)
    nested = checkpoint.family.text_section
    stated = {**config, **text} if nested is None else {**config, nested: {**config[nested], **text}}
    if nested is None:
        stated["model_type"] = _TYPES.get(checkpoint.family.model_type, checkpoint.family.model_type)
    else:
        stated["vocab_size"] = text["vocab_size"]  # mlx-lm takes it from the top level
    return {**stated, "quantization": section, SECTION: section}


def _text(checkpoint: Checkpoint) -> dict[str, Any]:
    family, config, layouts = checkpoint.family, checkpoint.text_config, checkpoint.shape.layouts
    text = {name: getattr(config, name) for name in _STATED[family.text_type]}
    text["tie_word_embeddings"] = checkpoint.tied_head
    ropes = {layout.kind: dict(layout.rope) for layout in layouts}
    kinds = {layout.kind: layout for layout in layouts}
    if family.heads_per_kind:
        full = kinds.get(FULL, layouts[0])
        own = kinds.get(SLIDING, full)
        text |= {"head_dim": own.head_dim, "num_key_value_heads": own.kv_heads, "rope_parameters": ropes}
        text |= {"global_head_dim": full.head_dim, "num_global_key_value_heads": full.kv_heads}
        if family.text_type == "gemma4_unified_text":
            text |= {"hidden_size_per_layer_input": 0, "enable_moe_block": False}
    elif family.rope_per_kind:
        full_rope, sliding_rope = (ropes.get(kind) or config.rope_parameters[kind] for kind in (FULL, SLIDING))
        scaling = {key: value for key, value in full_rope.items() if key != "rope_theta"}
        text |= {"rope_theta": full_rope["rope_theta"], "rope_local_base_freq": sliding_rope["rope_theta"]}
        text["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
        if family.text_type == "gemma3_text":
            text["sliding_window_pattern"] = _pattern(checkpoint)
    else:
        text["rope_theta"] = layouts[0].rope["rope_theta"]
    return text


def _pattern(checkpoint: Checkpoint) -> int | None:
    """Every how manieth layer is full; None if they are not evenly spaced."""
    kinds = [layout.kind for layout in checkpoint.shape.layouts]
    first = kinds.index(FULL) + 1 if FULL in kinds else len(kinds) + 1
    even = all((kind == FULL) == ((index + 1) % first == 0) for index, kind in enumerate(kinds))
    return first if even else None
