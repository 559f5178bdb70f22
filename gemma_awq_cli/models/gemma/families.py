"""Each Gemma family written out as data: its norms, its scale groups, what stays 16-bit. No code that computes.

Families are written out in full and never inherit from each other: Gemma 3 taking over Gemma 2's table has shipped as
a bug elsewhere. Names are relative to one decoder layer. The shapes come from the transformers module, not from here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from gemma_awq_cli.errors import GemmaAwqError

# How the inverse of a scale is taken up by what feeds the linears:
#   norm   an RMSNorm's gain; channel c of the norm feeds column c
#   heads  the rows of v_proj, one scale per kv-head channel, repeated for the query heads that share the kv head
#   rows   the rows of a linear whose output is multiplied, channel by channel, into the input
Fold = Literal["norm", "heads", "rows"]


@dataclass(frozen=True)
class ScaleGroup:
    """The linears that share one input, and so one scale a channel and one decision."""

    name: str
    linears: tuple[str, ...]
    source: str  # the module that takes up the inverse scale
    fold: Fold
    normalized: bool = False  # whether a norm follows the output before it is added to the residual


@dataclass(frozen=True)
class Layout:
    """Where a checkpoint keeps what transformers' causal model calls `model.*` and `lm_head.weight`."""

    prefix: str
    head: str


@dataclass(frozen=True)
class Family:
    """What the quantizer must know of one `model_type`."""

    model_type: str
    title: str
    gain_offset: float  # an RMSNorm multiplies by gain_offset + weight
    post_norms: bool  # whether a norm follows attention and MLP before the residual is added
    query_norms: bool  # whether q and k of each head are normalized (q_norm, k_norm) before the rotary embedding
    attention_softcap: bool  # whether attention scores obey the config's attn_logit_softcapping
    query_scale: Literal["head_dim", "query_pre_attn_scalar"]  # scores are multiplied by this config value ** -0.5
    norms: Mapping[
        str, str
    ]  # an RMSNorm's slot in the forward -> its module in a layer; q_norm and k_norm are a head's
    groups: tuple[ScaleGroup, ...]
    layouts: tuple[Layout, ...]  # where the language model's tensors live in a checkpoint, tried in this order
    read_layouts: tuple[Layout, ...]  # tried after them; other readers know them less, so artifacts use the first above
    companions: tuple[str, ...]  # key prefixes copied as they are (vision tower, projector)
    not_converted: tuple[str, ...]  # `modules_to_not_convert`, matched by substring by the readers
    float16: bool  # whether activations fit float16


_ATTENTION_INPUT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_MLP_INPUT = ("mlp.gate_proj", "mlp.up_proj")
# A text model saved without its head's class, or cut out of a multimodal one.
_TEXT_READ = (
    Layout("", "lm_head.weight"),
    Layout("language_model.model.", "language_model.lm_head.weight"),
    Layout("model.language_model.", "lm_head.weight"),
    Layout("language_model.", "lm_head.weight"),
)

GEMMA = Family(
    model_type="gemma",
    title="Gemma 1, 1.1, CodeGemma",
    gain_offset=1.0,
    post_norms=False,
    query_norms=False,
    attention_softcap=False,
    query_scale="head_dim",
    norms={"input_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    groups=(
        ScaleGroup("qkv", _ATTENTION_INPUT, "input_layernorm", "norm"),
        ScaleGroup("o", ("self_attn.o_proj",), "self_attn.v_proj", "heads"),
        # Gemma 1 has two norms a layer: this one feeds the MLP.
        ScaleGroup("gate_up", _MLP_INPUT, "post_attention_layernorm", "norm"),
        ScaleGroup("down", ("mlp.down_proj",), "mlp.up_proj", "rows"),
    ),
    layouts=(Layout("model.", "lm_head.weight"),),
    read_layouts=_TEXT_READ,
    companions=(),
    not_converted=("lm_head",),
    float16=True,
)

GEMMA2 = Family(
    model_type="gemma2",
    title="Gemma 2",
    gain_offset=1.0,
    post_norms=True,
    query_norms=False,
    attention_softcap=True,
    query_scale="query_pre_attn_scalar",
    norms={
        "input_norm": "input_layernorm",
        "attention_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "post_mlp_norm": "post_feedforward_layernorm",
    },
    groups=(
        ScaleGroup("qkv", _ATTENTION_INPUT, "input_layernorm", "norm"),
        ScaleGroup("o", ("self_attn.o_proj",), "self_attn.v_proj", "heads", normalized=True),
        # post_attention_layernorm follows o_proj here; the MLP is fed by pre_feedforward_layernorm.
        ScaleGroup("gate_up", _MLP_INPUT, "pre_feedforward_layernorm", "norm"),
        ScaleGroup("down", ("mlp.down_proj",), "mlp.up_proj", "rows", normalized=True),
    ),
    layouts=(Layout("model.", "lm_head.weight"),),
    read_layouts=_TEXT_READ,
    companions=(),
    not_converted=("lm_head",),
    float16=False,
)

GEMMA3_TEXT = Family(
    model_type="gemma3_text",
    title="Gemma 3 (text)",
    gain_offset=1.0,
    post_norms=True,
    query_norms=True,
    attention_softcap=False,
    query_scale="query_pre_attn_scalar",
    norms={
        "input_norm": "input_layernorm",
        "attention_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "post_mlp_norm": "post_feedforward_layernorm",
        "q_norm": "self_attn.q_norm",
        "k_norm": "self_attn.k_norm",
    },
    groups=(
        # q_norm and k_norm follow q and k, so a scale of their *input* still folds exactly.
        ScaleGroup("qkv", _ATTENTION_INPUT, "input_layernorm", "norm"),
        ScaleGroup("o", ("self_attn.o_proj",), "self_attn.v_proj", "heads", normalized=True),
        ScaleGroup("gate_up", _MLP_INPUT, "pre_feedforward_layernorm", "norm"),
        ScaleGroup("down", ("mlp.down_proj",), "mlp.up_proj", "rows", normalized=True),
    ),
    layouts=(Layout("model.", "lm_head.weight"),),
    read_layouts=_TEXT_READ,
    companions=(),
    not_converted=("lm_head",),
    float16=False,
)

GEMMA3 = Family(
    model_type="gemma3",
    title="Gemma 3 (multimodal: the language model is quantized, the vision tower is copied)",
    gain_offset=1.0,
    post_norms=True,
    query_norms=True,
    attention_softcap=False,
    query_scale="query_pre_attn_scalar",
    norms={
        "input_norm": "input_layernorm",
        "attention_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "post_mlp_norm": "post_feedforward_layernorm",
        "q_norm": "self_attn.q_norm",
        "k_norm": "self_attn.k_norm",
    },
    groups=(
        ScaleGroup("qkv", _ATTENTION_INPUT, "input_layernorm", "norm"),
        ScaleGroup("o", ("self_attn.o_proj",), "self_attn.v_proj", "heads", normalized=True),
        ScaleGroup("gate_up", _MLP_INPUT, "pre_feedforward_layernorm", "norm"),
        ScaleGroup("down", ("mlp.down_proj",), "mlp.up_proj", "rows", normalized=True),
    ),
    layouts=(
        Layout("language_model.model.", "language_model.lm_head.weight"),  # the hub's files
        Layout("model.language_model.", "lm_head.weight"),  # what transformers 5 calls the same modules
    ),
    read_layouts=(Layout("language_model.", "lm_head.weight"),),  # a model saved without its head's class
    companions=("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
    not_converted=("lm_head", "vision_tower", "multi_modal_projector"),
    float16=False,
)

FAMILIES: Mapping[str, Family] = {f.model_type: f for f in (GEMMA, GEMMA2, GEMMA3_TEXT, GEMMA3)}

FLOAT16_REASON = "its activations overflow float16 (NaN or <pad> output)"


def family_of(model_type: str) -> Family:
    """The family of a config's `model_type`; an error that names what is supported for any other."""
    family = FAMILIES.get(model_type)
    if family is None:
        supported = "; ".join(f"{f.model_type} ({f.title})" for f in FAMILIES.values())
        raise GemmaAwqError(
            f"model_type {model_type!r} is not supported.",
            f"Supported model types: {supported}.",
        )
    return family
