"""What a Gemma's forward must know, read once from the config and the family's table."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.gemma.config_values import HINT
from gemma_awq_cli.models.gemma.families import Family
from gemma_awq_cli.models.gemma.layers import SLIDING, LayerLayout, layers_of
from gemma_awq_cli.system.failures import library_errors


@dataclass(frozen=True)
class Rope:
    """inv_freq: [head_dim / 2] float32; factor: what cosine and sine are multiplied by."""

    inv_freq: Tensor
    factor: float


@dataclass(frozen=True)
class TextShape:
    """All that the shapes of a language model's tensors follow from."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    layers: int
    post_norms: bool
    query_norms: bool
    attention_bias: bool
    layouts: tuple[LayerLayout, ...]

    @property
    def query_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Architecture(TextShape):
    """One text model. windows and ropes: one entry a layer, None where a layer sees everything."""

    eps: float
    gain_offset: float
    query_scale: float
    attention_softcap: float | None
    final_softcap: float | None
    windows: tuple[int | None, ...]
    ropes: tuple[Rope, ...]
    embed_scale: float
    context: int


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
    if any(_rope_parameters(config, kind).get("rope_type") == "longrope" for kind in set(_layer_types(config))):
        return "its rotary embedding changes with the length of the text"
    return None


def shape_of(config: Any, family: Family) -> TextShape:
    """The sizes that a config says."""
    return TextShape(
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads),
        vocabulary=config.vocab_size,
        layers=config.num_hidden_layers,
        post_norms=family.post_norms,
        query_norms=family.query_norms,
        attention_bias=config.attention_bias,
        layouts=layers_of(config, family),
    )


def architecture_of(config: Any, family: Family) -> Architecture:
    """The forward's facts of a text config for which `refusal` is None."""
    shape = shape_of(config, family)
    kinds = _layer_types(config)
    ropes = {kind: _rope(config, kind, shape.head_dim) for kind in set(kinds)}
    scaled_by = shape.head_dim if family.query_scale == "head_dim" else config.query_pre_attn_scalar
    return Architecture(
        **vars(shape),
        eps=config.rms_norm_eps,
        gain_offset=family.gain_offset,
        query_scale=float(scaled_by) ** -0.5,
        attention_softcap=config.attn_logit_softcapping if family.attention_softcap else None,
        final_softcap=getattr(config, "final_logit_softcapping", None),
        windows=tuple(config.sliding_window if kind == SLIDING else None for kind in kinds),
        ropes=tuple(ropes[kind] for kind in kinds),
        embed_scale=float(shape.hidden) ** 0.5,
        context=config.max_position_embeddings,
    )


def require_rope(config: Any, shape: TextShape, where: Path) -> None:
    """An error unless every layer's rotary frequencies are numbers and fit the heads.

    where: config.json, for errors.
    """
    for kind in sorted(set(_layer_types(config))):
        own = _rope_parameters(config, kind)
        if own.get("partial_rotary_factor", 1.0) != 1.0 and own["rope_type"] != "proportional":
            raise GemmaAwqError(
                f"{where}: partial_rotary_factor is {own['partial_rotary_factor']:g}; a Gemma turns its heads whole.",
                HINT,
            )
        for name in ("short_factor", "long_factor"):  # transformers takes one or the other by the text's length
            if name in own and len(own[name]) != shape.head_dim // 2:
                raise GemmaAwqError(
                    f"{where}: {name} has {len(own[name])} entries, not one for each pair of head_dim "
                    f"{shape.head_dim}.",
                    HINT,
                )
        with library_errors(f"{where}: rotary parameters of type {own['rope_type']} cannot be used", HINT):
            rope = _rope(config, kind, shape.head_dim)
        numbers = [*rope.inv_freq.tolist(), rope.factor]
        if len(rope.inv_freq) != shape.head_dim // 2 or not all(map(_is_finite, numbers)):
            raise GemmaAwqError(
                f"{where}: the rotary parameters give no frequency for each pair of head_dim {shape.head_dim}.", HINT
            )


def _is_finite(value: float) -> bool:
    return 0 <= value < float("inf")


def _layer_types(config: Any) -> list[str]:
    return getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers


def _rope_parameters(config: Any, kind: str) -> dict[str, Any]:
    """A layer type's rotary parameters; Gemma 3 has one set per type, Gemma 1 and 2 one for all."""
    parameters = config.rope_parameters
    own: dict[str, Any] = parameters if _is_one_set(parameters) else parameters[kind]
    return own


def _is_one_set(parameters: dict[str, Any]) -> bool:
    return "rope_type" in parameters or "rope_theta" in parameters


def _rope(config: Any, kind: str, head_dim: int) -> Rope:
    """The rotary frequencies of a layer type."""
    own = _rope_parameters(config, kind)
    if own.get("rope_type", "default") == "default":
        steps = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        return Rope(1.0 / (own["rope_theta"] ** steps), 1.0)
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    chosen = {} if _is_one_set(config.rope_parameters) else {"layer_type": kind}
    inv_freq, factor = ROPE_INIT_FUNCTIONS[own["rope_type"]](config, None, **chosen)
    return Rope(inv_freq, float(factor))
