"""Each Gemma family as data: what its layers hold, its scale groups, its names, its licence. No code that computes.

Families are written out in full and never inherit from each other: Gemma 3 taking over Gemma 2's table has shipped as
a bug elsewhere. Names are relative to one decoder layer. The sizes of a layer follow from a config: see layers.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from gemma_awq_cli.errors import GemmaAwqError

# The kinds of attention layers, as a config spells them.
FULL = "full_attention"
SLIDING = "sliding_attention"

# How the module that feeds a group of linears takes up the inverse of the group's scale:
#   norm   an RMSNorm's gain; channel c of the norm feeds column c
#   heads  the rows of v_proj, one scale per kv-head channel, repeated for the query heads that share the kv head
#   rows   the rows of a linear whose output is multiplied, channel by channel, into the input
Fold = Literal["norm", "heads", "rows"]


@dataclass(frozen=True)
class ScaleGroup:
    """The linears that share one input, and so one scale per channel and one decision."""

    name: str
    linears: tuple[str, ...]
    source: str  # the module that takes up the inverse scale
    fold: Fold
    normalized: bool = False  # whether a norm follows the output before it is added to the residual


@dataclass(frozen=True)
class KeyLayout:
    """The names in a checkpoint's files of what transformers' causal model calls `model.*` and `lm_head.weight`."""

    prefix: str
    head: str


@dataclass(frozen=True)
class Family:
    """Everything that is known of one `model_type`."""

    model_type: str
    title: str
    licence: str  # the hub's id of the licence that Google releases the family under
    end_of_turn: str  # the token that ends a turn of a chat
    text_type: str  # the model_type of the language model alone
    text_section: str | None  # the section of config.json that describes the language model; None: the top level
    config_class: str  # transformers' class of config.json
    model_class: str  # transformers' class of the model, as `architectures` names it
    activation_key: Literal["hidden_act", "hidden_activation"]  # the config's name of the MLP's activation
    layer_kinds: tuple[str, ...]  # the kinds of layers that a model can have; where there are several, the config tells
    rope_per_kind: bool  # whether each kind of layer has rotary parameters of its own
    gain_offset: float  # an RMSNorm multiplies by gain_offset + weight
    attention_softcap: bool  # whether attention scores obey the config's attn_logit_softcapping
    query_scale: Literal["head_dim", "query_pre_attn_scalar"]  # scores are multiplied by this config value ** -0.5
    norms: Mapping[str, str]  # an RMSNorm's slot in the forward -> its module; q_norm and k_norm have head_dim channels
    groups: tuple[ScaleGroup, ...]
    key_layouts: tuple[KeyLayout, ...]  # tried in this order; artifacts are written in the first
    read_layouts: tuple[KeyLayout, ...]  # tried after them, and never written: other readers may not know them
    companions: tuple[str, ...]  # key prefixes copied as they are (vision tower, projector)
    not_converted: tuple[str, ...]  # `modules_to_not_convert`; readers match them by substring
    float16: bool  # whether activations fit float16


_ATTENTION_INPUT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_MLP_INPUT = ("mlp.gate_proj", "mlp.up_proj")
# A text model saved without its head's class, or cut out of a multimodal one.
_TEXT_READ = (
    KeyLayout("", "lm_head.weight"),
    KeyLayout("language_model.model.", "language_model.lm_head.weight"),
    KeyLayout("model.language_model.", "lm_head.weight"),
    KeyLayout("language_model.", "lm_head.weight"),
)

GEMMA = Family(
    model_type="gemma",
    title="Gemma 1, 1.1, CodeGemma",
    licence="gemma",
    end_of_turn="<end_of_turn>",
    text_type="gemma",
    text_section=None,
    config_class="GemmaConfig",
    model_class="GemmaForCausalLM",
    activation_key="hidden_act",
    layer_kinds=(FULL,),
    rope_per_kind=False,
    gain_offset=1.0,
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
    key_layouts=(KeyLayout("model.", "lm_head.weight"),),
    read_layouts=_TEXT_READ,
    companions=(),
    not_converted=("lm_head",),
    float16=True,
)

GEMMA2 = Family(
    model_type="gemma2",
    title="Gemma 2",
    licence="gemma",
    end_of_turn="<end_of_turn>",
    text_type="gemma2",
    text_section=None,
    config_class="Gemma2Config",
    model_class="Gemma2ForCausalLM",
    activation_key="hidden_activation",
    layer_kinds=(SLIDING, FULL),
    rope_per_kind=False,
    gain_offset=1.0,
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
    key_layouts=(KeyLayout("model.", "lm_head.weight"),),
    read_layouts=_TEXT_READ,
    companions=(),
    not_converted=("lm_head",),
    float16=False,
)

GEMMA3_TEXT = Family(
    model_type="gemma3_text",
    title="Gemma 3 (text)",
    licence="gemma",
    end_of_turn="<end_of_turn>",
    text_type="gemma3_text",
    text_section=None,
    config_class="Gemma3TextConfig",
    model_class="Gemma3ForCausalLM",
    activation_key="hidden_activation",
    layer_kinds=(SLIDING, FULL),
    rope_per_kind=True,
    gain_offset=1.0,
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
    key_layouts=(KeyLayout("model.", "lm_head.weight"),),
    read_layouts=_TEXT_READ,
    companions=(),
    not_converted=("lm_head",),
    float16=False,
)

GEMMA3 = Family(
    model_type="gemma3",
    title="Gemma 3 (multimodal: the language model is quantized, the vision tower is copied)",
    licence="gemma",
    end_of_turn="<end_of_turn>",
    text_type="gemma3_text",
    text_section="text_config",
    config_class="Gemma3Config",
    model_class="Gemma3ForConditionalGeneration",
    activation_key="hidden_activation",
    layer_kinds=(SLIDING, FULL),
    rope_per_kind=True,
    gain_offset=1.0,
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
    key_layouts=(
        KeyLayout("language_model.model.", "language_model.lm_head.weight"),  # the hub's files
        KeyLayout("model.language_model.", "lm_head.weight"),  # what transformers 5 calls the same modules
    ),
    read_layouts=(KeyLayout("language_model.", "lm_head.weight"),),  # a model saved without its head's class
    companions=("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
    not_converted=("lm_head", "vision_tower", "multi_modal_projector"),
    float16=False,
)

FAMILIES: Mapping[str, Family] = {f.model_type: f for f in (GEMMA, GEMMA2, GEMMA3_TEXT, GEMMA3)}

FLOAT16_REASON = "its activations overflow float16 (NaN or <pad> output)"


def family_of(model_type: str) -> Family:
    """The family of a config's `model_type`. For any other, an error that lists the supported ones."""
    family = FAMILIES.get(model_type)
    if family is None:
        supported = "; ".join(f"{f.model_type} ({f.title})" for f in FAMILIES.values())
        raise GemmaAwqError(
            f"model_type {model_type!r} is not supported.",
            f"Supported model types: {supported}.",
        )
    return family
