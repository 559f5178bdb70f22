"""What the forward of one Gemma must know, read once from its config and its family."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemma_awq_cli.models.gemma.family import Family
from gemma_awq_cli.models.gemma.layers import LayerLayout, layers_of

if TYPE_CHECKING:
    from gemma_awq_cli.models.gemma.rotary import Rope


@dataclass(frozen=True)
class PerLayerInputs:
    """The per-layer embeddings: a table [vocabulary, layers * width], and a projection of the embedded token.

    The input of layer i is (norm(P_i e / sqrt(hidden)) + sqrt(width) T_i[token]) / sqrt(2): e is the scaled embedding
    of the token, P_i [width, hidden] and T_i [vocabulary, width] are the layer's slices of the two matrices.
    """

    vocabulary: int
    width: int


@dataclass(frozen=True)
class AltUp:
    """Alternating updates: the hidden states are `streams` streams, of which the layer computes with one.

    scaled: whether the corrected active stream is scaled before it gates the per-layer input.
    """

    streams: int
    active: int
    scaled: bool


@dataclass(frozen=True)
class TextShape:
    """The sizes that decide the shapes of a language model's tensors. layouts: one per layer."""

    hidden: int
    vocabulary: int
    layouts: tuple[LayerLayout, ...]
    per_layer: PerLayerInputs | None
    altup: AltUp | None

    @property
    def layers(self) -> int:
        return len(self.layouts)

    @property
    def kv_sources(self) -> frozenset[int]:
        """The layers whose keys and values other layers read too."""
        return frozenset(layout.kv_source for layout in self.layouts if layout.kv_source is not None)

    @property
    def first_kv_reader(self) -> int:
        """The first of the layers at the end that have no keys and values of their own; `layers` if all have them."""
        return next((i for i, layout in enumerate(self.layouts) if layout.kv_source is not None), self.layers)

    def unused(self) -> list[str]:
        """Modules that a file may hold and that no forward has: keys and values of layers that read another's."""
        return [
            f"model.layers.{index}.self_attn.{name}"
            for index, layout in enumerate(self.layouts)
            if layout.kv_source is not None
            for name in ("k_proj", "v_proj", "k_norm", "v_norm")
        ]

    def outer(self) -> dict[str, tuple[int, ...]]:
        """Tensors outside the layers beside embedding, final norm and head, by their names in the causal model."""
        found: dict[str, tuple[int, ...]] = {}
        if self.per_layer is not None:
            width = self.per_layer.width
            found[PER_LAYER_TABLE] = (self.per_layer.vocabulary, self.layers * width)
            found[PER_LAYER_PROJECTION] = (self.layers * width, self.hidden)
            found[PER_LAYER_NORM] = (width,)
        if self.altup is not None:
            for index in range(self.altup.streams - 1):
                found[f"model.altup_projections.{index}.weight"] = (self.hidden, self.hidden)
                found[f"model.altup_unembed_projections.{index}.weight"] = (self.hidden, self.hidden)
        return found


PER_LAYER_TABLE = "model.embed_tokens_per_layer.weight"
PER_LAYER_PROJECTION = "model.per_layer_model_projection.weight"
PER_LAYER_NORM = "model.per_layer_projection_norm.weight"


@dataclass(frozen=True)
class Architecture(TextShape):
    """One text model. ropes: one per layer; query_scale: what attention scores are multiplied by."""

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
    width = getattr(config, "hidden_size_per_layer_input", None)
    altup = None
    if family.altup:
        altup = AltUp(config.altup_num_inputs, config.altup_active_idx, bool(config.altup_correct_scale))
    return TextShape(
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        layouts=layers_of(config, family),
        per_layer=PerLayerInputs(config.vocab_size_per_layer_input, width) if width else None,
        altup=altup,
    )


def architecture_of(config: Any, family: Family) -> Architecture:
    """The facts that a forward of our own needs; the forward must know all of `features_of(config, family)`."""
    from gemma_awq_cli.models.gemma.rotary import ropes_of

    shape = shape_of(config, family)
    return Architecture(
        **vars(shape),
        eps=config.rms_norm_eps,
        gain_offset=family.gain_offset,
        query_scale=_query_scale(config, family, shape),
        attention_softcap=config.attn_logit_softcapping if family.attention_softcap else None,
        final_softcap=final_softcap(config),
        ropes=ropes_of(config, family, shape.layouts),
        embed_scale=float(shape.hidden) ** 0.5,
        context=config.max_position_embeddings,
    )


def _query_scale(config: Any, family: Family, shape: TextShape) -> float:
    if family.query_scale is None:
        return 1.0
    scaled_by = shape.layouts[0].head_dim if family.query_scale == "head_dim" else config.query_pre_attn_scalar
    return float(scaled_by) ** -0.5


def final_softcap(config: Any) -> float | None:
    """The cap c of the logits, c * tanh(logits / c); None: none."""
    cap: float | None = getattr(config, "final_logit_softcapping", None)
    return cap
