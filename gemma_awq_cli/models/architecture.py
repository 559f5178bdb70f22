"""What a Gemma's forward must know, read once from the config and the family's table."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemma_awq_cli.families import Family

SLIDING = "sliding_attention"


@dataclass(frozen=True)
class Rope:
    """inv_freq: [head_dim / 2] float32; factor: what cosine and sine are multiplied by."""

    inv_freq: Tensor
    factor: float


@dataclass(frozen=True)
class Architecture:
    """One text model. windows and ropes: one entry a layer, None where a layer sees everything."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    eps: float
    gain_offset: float
    post_norms: bool
    query_norms: bool
    query_scale: float
    attention_softcap: float | None
    final_softcap: float | None
    windows: tuple[int | None, ...]
    ropes: tuple[Rope, ...]
    embed_scale: float
    context: int

    @property
    def layers(self) -> int:
        return len(self.windows)

    @property
    def query_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim


def refusal(config: Any) -> str | None:
    """Why a decode path of our own does not know this text config, or None. transformers' modules know more.

    config: a `Checkpoint`'s facts, here and below.
    """
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != "gelu_pytorch_tanh":
        return f"the activation is {activation}, not gelu_pytorch_tanh"
    if config.attention_bias:
        return "its attention has biases"
    if getattr(config, "use_bidirectional_attention", None):
        return "its attention looks both ways"
    return None


def architecture_of(config: Any, family: Family) -> Architecture:
    """The forward's facts of a text config for which `refusal` is None."""
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    ropes = {kind: _rope(config, kind, head_dim) for kind in set(kinds)}
    scaled_by = head_dim if family.query_scale == "head_dim" else config.query_pre_attn_scalar
    return Architecture(
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        vocabulary=config.vocab_size,
        eps=config.rms_norm_eps,
        gain_offset=family.gain_offset,
        post_norms=family.post_norms,
        query_norms=family.query_norms,
        query_scale=float(scaled_by) ** -0.5,
        attention_softcap=config.attn_logit_softcapping if family.attention_softcap else None,
        final_softcap=getattr(config, "final_logit_softcapping", None),
        windows=tuple(config.sliding_window if kind == SLIDING else None for kind in kinds),
        ropes=tuple(ropes[kind] for kind in kinds),
        embed_scale=float(config.hidden_size) ** 0.5,
        context=config.max_position_embeddings,
    )


def _rope(config: Any, kind: str, head_dim: int) -> Rope:
    """The rotary frequencies of a layer type; Gemma 3 has one set a type, Gemma 1 and 2 one for all."""
    parameters = config.rope_parameters
    per_type = "rope_type" not in parameters and "rope_theta" not in parameters
    own = parameters[kind] if per_type else parameters
    if own.get("rope_type", "default") == "default":
        steps = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        return Rope(1.0 / (own["rope_theta"] ** steps), 1.0)
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    inv_freq, factor = ROPE_INIT_FUNCTIONS[own["rope_type"]](config, None, **({"layer_type": kind} if per_type else {}))
    return Rope(inv_freq, float(factor))
