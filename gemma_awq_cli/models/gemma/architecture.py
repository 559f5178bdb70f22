"""What the forward of one Gemma must know, read once from its config and its family."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemma_awq_cli.models.gemma.families import Family
from gemma_awq_cli.models.gemma.layers import LayerLayout, layers_of

if TYPE_CHECKING:
    from gemma_awq_cli.models.gemma.rotary import Rope


@dataclass(frozen=True)
class TextShape:
    """The sizes that decide the shapes of a language model's tensors. layouts: one per layer."""

    hidden: int
    vocabulary: int
    layouts: tuple[LayerLayout, ...]

    @property
    def layers(self) -> int:
        return len(self.layouts)


@dataclass(frozen=True)
class Architecture(TextShape):
    """One text model. ropes: one per layer."""

    eps: float
    gain_offset: float
    query_scale: float
    attention_softcap: float | None
    final_softcap: float | None
    ropes: "tuple[Rope, ...]"
    embed_scale: float
    context: int


def shape_of(config: Any, family: Family) -> TextShape:
    """The sizes of the model that a text config describes. config: a `Checkpoint`'s facts, here and below."""
    return TextShape(hidden=config.hidden_size, vocabulary=config.vocab_size, layouts=layers_of(config, family))


def architecture_of(config: Any, family: Family) -> Architecture:
    """The facts that a forward of our own needs; the forward must know all of `features_of(config, family)`."""
    from gemma_awq_cli.models.gemma.rotary import ropes_of

    shape = shape_of(config, family)
    scaled_by = shape.layouts[0].head_dim if family.query_scale == "head_dim" else config.query_pre_attn_scalar
    return Architecture(
        **vars(shape),
        eps=config.rms_norm_eps,
        gain_offset=family.gain_offset,
        query_scale=float(scaled_by) ** -0.5,
        attention_softcap=config.attn_logit_softcapping if family.attention_softcap else None,
        final_softcap=final_softcap(config),
        ropes=ropes_of(config, family, shape.layouts),
        embed_scale=float(shape.hidden) ** 0.5,
        context=config.max_position_embeddings,
    )


def final_softcap(config: Any) -> float | None:
    """The cap c of the logits, c * tanh(logits / c); None: none."""
    cap: float | None = getattr(config, "final_logit_softcapping", None)
    return cap
