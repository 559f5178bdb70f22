"""The metadata of a GGUF file of a Gemma: every key that llama.cpp reads, and why it cannot run some models.

llama.cpp computes some of a model's numbers itself, from others: those are compared here, because a wrong one would
give fluent nonsense. Source: llama.cpp `src/models/gemma*.cpp` and its converter, `conversion/gemma.py`.
"""

from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

from gemma_awq_cli.export.gguf_tokenizer import GgufTokenizer
from gemma_awq_cli.export.llama_cpp_names import ARCHITECTURES
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.gemma.architecture import final_softcap
from gemma_awq_cli.models.gemma.family import FULL, SLIDING
from gemma_awq_cli.models.gemma.features import FEATURES, features_of
from gemma_awq_cli.models.gemma.layers import LayerLayout

# The features that each architecture of llama.cpp computes.
_POST_NORMS = frozenset(("post_norms", "sliding_window", "final_softcap"))
_KNOWN: Mapping[str, frozenset[str]] = {
    "gemma": frozenset(),
    "gemma2": _POST_NORMS | {"attention_softcap"},
    "gemma3": _POST_NORMS | {"qk_norm"},
    "gemma3n": _POST_NORMS | {"qk_norm", "value_norm", "shared_kv", "per_layer_inputs", "altup", "sparse_gate"},
    "gemma4": _POST_NORMS | {
        "qk_norm", "value_norm", "keys_are_values", "shared_kv", "per_layer_inputs", "layer_scalar", "experts",
    },
}  # fmt: skip
_UNTIED = ("gemma3", "gemma3n", "gemma4")  # may have a head of their own
# Whether every n-th layer is a full one, unless the file says otherwise.
_PATTERNS = {"gemma2": 2, "gemma3": 6}
# The numbers of layers of the 27B, whose attention scores llama.cpp scales otherwise.
_WIDE_SCALE = {"gemma2": 46, "gemma3": 62}
# What llama.cpp's Gemma 3n is built for.
_OWN_KV, _SPARSE_LAYERS, _SPARSITY, _STREAMS, _LAUREL_RANK, _PER_LAYER, _CAP = 20, 10, 0.95, 4, 64, 256, 30.0
FILE_TYPES = {"Q4_0": 2, "Q4_1": 3, "Q5_0": 8}  # general.file_type, after the type of most weights
QUANTIZATION_VERSION = 2


def architecture_of(checkpoint: Checkpoint) -> str | None:
    """Return llama.cpp's name of the model's architecture; None if it has none."""
    return ARCHITECTURES.get(checkpoint.family.text_type)


def family_refusal(checkpoint: Checkpoint) -> str | None:
    """Why llama.cpp cannot run the model, as a clause, or None."""
    architecture = architecture_of(checkpoint)
    if architecture is None:
        return f"llama.cpp has no {checkpoint.family.title}"
    facts, layouts = checkpoint.facts, checkpoint.shape.layouts
    if missing := features_of(facts, checkpoint.family) - _KNOWN[architecture]:
        return f"llama.cpp's {architecture} has no {' and no '.join(FEATURES[name] for name in sorted(missing))}"
    if not checkpoint.tied_head and architecture not in _UNTIED:
        return f"llama.cpp's {architecture} takes the embedding for its head, and this model has a head of its own"
    return (
        _scale_refusal(architecture, facts, layouts)
        or _rope_refusal(architecture, layouts)
        or (_fixed_refusal(checkpoint) if architecture == "gemma3n" else None)
    )


def _scale_refusal(architecture: str, facts: Any, layouts: Sequence[LayerLayout]) -> str | None:
    if architecture == "gemma2" and not facts.attn_logit_softcapping:
        return "llama.cpp's gemma2 always caps attention scores, and this model does not"
    if architecture not in _WIDE_SCALE:
        return None
    wide = len(layouts) == _WIDE_SCALE[architecture]
    scaled_by = layouts[0].hidden // layouts[0].heads if wide else layouts[0].head_dim
    if facts.query_pre_attn_scalar != scaled_by:
        return (
            f"llama.cpp's {architecture} of {len(layouts)} layers divides attention scores by the root of {scaled_by}, "
            f"and this model by that of query_pre_attn_scalar, {facts.query_pre_attn_scalar:g}"
        )
    return None


def _rope_refusal(architecture: str, layouts: Sequence[LayerLayout]) -> str | None:
    for layout in layouts:
        kind = layout.rope["rope_type"]
        allowed: tuple[str, ...] = ("default",)
        if layout.kind == FULL:
            allowed = ("proportional",) if architecture == "gemma4" else ("default", "linear")
        if kind not in allowed or (kind == "linear" and architecture == "gemma2"):
            return f"llama.cpp's {architecture} has no rotary embedding of type {kind} in {layout.kind} layers"
    return None


def _fixed_refusal(checkpoint: Checkpoint) -> str | None:
    shape, facts = checkpoint.shape, checkpoint.facts
    sparse = [layout.sparsity for layout in shape.layouts]
    assert shape.altup is not None, "Gemma 3n has several streams"
    found = {
        "layers with keys and values of their own": (shape.first_kv_reader, _OWN_KV),
        "streams": (shape.altup.streams, _STREAMS),
        "the active stream": (shape.altup.active, 0),
        "laurel_rank": (facts.laurel_rank, _LAUREL_RANK),
        "hidden_size_per_layer_input": (facts.hidden_size_per_layer_input, _PER_LAYER),
        "final_logit_softcapping": (final_softcap(facts), _CAP),
        "activation_sparsity_pattern": (
            sparse, [_SPARSITY] * _SPARSE_LAYERS + [0.0] * (len(sparse) - _SPARSE_LAYERS)
        ),
    }  # fmt: skip
    for what, (here, there) in found.items():
        if here != there:
            return f"llama.cpp's gemma3n is built for the released sizes ({what}: {there}), and this model has {here}"
    return None


def add_model(writer: Any, checkpoint: Checkpoint, name: str, file_type: int) -> None:
    """Add the keys that describe the model. writer: a gguf.GGUFWriter."""
    facts, shape, layouts = checkpoint.facts, checkpoint.shape, checkpoint.shape.layouts
    architecture, first = architecture_of(checkpoint), layouts[0]
    full = next((layout for layout in layouts if layout.kind == FULL), first)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_license(checkpoint.family.licence)
    writer.add_file_type(file_type)
    writer.add_quantization_version(QUANTIZATION_VERSION)
    writer.add_context_length(int(facts.max_position_embeddings))
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(_one_or_all([layout.intermediate for layout in layouts]))
    writer.add_head_count(first.heads)
    writer.add_head_count_kv(_one_or_all([layout.kv_heads for layout in layouts]))
    writer.add_layer_norm_rms_eps(float(facts.rms_norm_eps))
    writer.add_key_length(full.head_dim)
    writer.add_value_length(full.head_dim)
    writer.add_rope_freq_base(float(full.rope["rope_theta"]))
    if full.rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(_linear())
        writer.add_rope_scaling_factor(float(full.rope["factor"]))
    if "attention_softcap" in _KNOWN[str(architecture)]:
        writer.add_attn_logit_softcapping(float(facts.attn_logit_softcapping))
    if "final_softcap" in _KNOWN[str(architecture)]:
        writer.add_final_logit_softcapping(float(final_softcap(facts) or 0.0))
    _add_windows(writer, str(architecture), layouts)
    if shape.per_layer is not None or architecture == "gemma4":
        writer.add_embedding_length_per_layer_input(first.per_layer_width)
    if architecture in ("gemma3n", "gemma4"):
        writer.add_shared_kv_layers(shape.layers - shape.first_kv_reader)
    if shape.altup is not None:
        writer.add_altup_active_idx(shape.altup.active)
        writer.add_altup_num_inputs(shape.altup.streams)
        writer.add_activation_sparsity_scale([_deviations(layout.sparsity) for layout in layouts])
    if architecture == "gemma4":
        _add_head_sizes(writer, layouts)
    if first.experts is not None:
        writer.add_expert_count(first.experts.count)
        writer.add_expert_used_count(first.experts.active)
        writer.add_expert_feed_forward_length(first.experts.intermediate)


def _one_or_all(values: list[int]) -> int | list[int]:
    """Layers that are alike have one number, as in files that older versions of llama.cpp read."""
    return values[0] if len(set(values)) == 1 else values


def _add_windows(writer: Any, architecture: str, layouts: Sequence[LayerLayout]) -> None:
    sliding = [layout.kind == SLIDING for layout in layouts]
    if not any(sliding):
        return
    one = layouts[sliding.index(True)]
    writer.add_sliding_window(one.window)
    writer.add_rope_freq_base_swa(float(one.rope["rope_theta"]))
    pattern = _PATTERNS.get(architecture)
    if pattern is None or sliding != [(index + 1) % pattern != 0 for index in range(len(layouts))]:
        writer.add_sliding_window_pattern(sliding)


def _add_head_sizes(writer: Any, layouts: Sequence[LayerLayout]) -> None:
    """Gemma 4's sliding layers have heads of their own size."""
    sizes = {layout.kind: layout.head_dim for layout in layouts}
    full = sizes.get(FULL, layouts[0].head_dim)
    sliding = sizes.get(SLIDING, full)
    writer.add_key_length_swa(sliding)
    writer.add_value_length_swa(sliding)
    writer.add_rope_dimension_count(full)
    writer.add_rope_dimension_count_swa(sliding)


def _deviations(sparsity: float) -> float:
    """Return how many deviations above its mean a gate is cut off, so that the share `sparsity` is."""
    return NormalDist().inv_cdf(sparsity) if sparsity else float("-inf")


def _linear() -> Any:
    import gguf

    return gguf.RopeScalingType.LINEAR


def add_tokenizer(writer: Any, tokenizer: GgufTokenizer) -> None:
    """Add the keys of the tokenizer. writer: a gguf.GGUFWriter."""
    writer.add_tokenizer_model(tokenizer.model)
    if not tokenizer.merges:
        writer.add_tokenizer_pre("default")
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_scores(tokenizer.scores)
    writer.add_token_types(tokenizer.types)
    if tokenizer.merges:
        writer.add_token_merges(tokenizer.merges)
    for kind, index in tokenizer.special.items():
        getattr(writer, f"add_{kind}_token_id")(index)
    # Without BOS a Gemma is lost, whatever the tokenizer's files say of it.
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template.text)
