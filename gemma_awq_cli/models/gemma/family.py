"""What a table of a Gemma family holds: its names, its norms, its scale groups, its licence.

Names are relative to one decoder layer. The sizes of a layer follow from a config: see layers.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

# The kinds of attention layers, as a config spells them.
FULL = "full_attention"
SLIDING = "sliding_attention"

# How the module that feeds a group of linears takes up the inverse of the group's scale:
#   norm   an RMSNorm's gain; channel c of the norm feeds column c
#   heads  the rows of v_proj, one scale per kv-head channel, repeated for the query heads that share the kv head
#   rows   the rows of a linear whose output is multiplied, channel by channel, into the input
#   none   nothing can: the linears are rounded with error compensation, without a scale
Fold = Literal["norm", "heads", "rows", "none"]


@dataclass(frozen=True)
class ScaleGroup:
    """The linears that share one input, and so one scale per channel and one decision."""

    name: str
    linears: tuple[str, ...]
    source: str | None  # the module that takes up the inverse scale; None for the fold `none`
    fold: Fold
    normalized: bool = False  # whether a norm follows the output before it is added to the residual


@dataclass(frozen=True)
class KeyLayout:
    """The names in a checkpoint's files of what transformers' causal model calls `model.*` and `lm_head.weight`."""

    prefix: str
    head: str


@dataclass(frozen=True)
class Companion:
    """A part of a multimodal model beside its language model. Its tensors are copied as they are.

    name: of the module, in transformers and in the files; section: of config.json, which describes the part. made_by:
    transformers' class, below `transformers.models`; None if another library makes it. made_from: what the class is
    given. unused: modules of the class whose tensors a checkpoint need not have. library: which transformers needs for
    the part.
    """

    name: str
    section: str
    made_by: str | None
    made_from: Literal["section", "section and text", "config"] = "section"
    unused: tuple[str, ...] = ()
    library: str = ""


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
    heads_per_kind: bool  # whether each kind of layer has sizes of heads of its own
    gain_offset: float  # an RMSNorm multiplies by gain_offset + weight
    attention_softcap: bool  # whether attention scores obey the config's attn_logit_softcapping
    # attention scores are multiplied by this config value ** -0.5, or not at all
    query_scale: Literal["head_dim", "query_pre_attn_scalar"] | None
    value_norm: bool  # whether values are normalized, without a gain
    layer_scalar: bool  # whether a layer's output is multiplied by a stored scalar
    altup: bool  # whether the hidden states are several streams (AltUp), with Laurel beside attention
    # An RMSNorm's slot in the forward -> its module; q_norm and k_norm have head_dim channels. A layer has those of the
    # parts that it has.
    norms: Mapping[str, str]
    groups: tuple[ScaleGroup, ...]
    key_layouts: tuple[KeyLayout, ...]  # tried in this order; artifacts are written in the first
    read_layouts: tuple[KeyLayout, ...]  # tried after them, and never written: other readers may not know them
    companions: tuple[Companion, ...]  # a multimodal model's other parts
    # `modules_to_not_convert`. vLLM and SGLang match an entry anywhere in a module's name, transformers only from the
    # name's start to a dot, or as its end: so what lies under `model.` there is listed with that and without.
    not_converted: tuple[str, ...]
    float16: bool  # whether activations fit float16

    @property
    def companion_prefixes(self) -> tuple[str, ...]:
        """What the names of the companions' tensors in the files begin with."""
        return tuple(f"{outer}{one.name}." for one in self.companions for outer in ("", "model."))


# A text model saved without its head's class, or cut out of a multimodal one.
TEXT_READ = (
    KeyLayout("", "lm_head.weight"),
    KeyLayout("language_model.model.", "language_model.lm_head.weight"),
    KeyLayout("model.language_model.", "lm_head.weight"),
    KeyLayout("language_model.", "lm_head.weight"),
)
