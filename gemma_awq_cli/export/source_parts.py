"""A packed checkpoint's language model in parts of bounded size: the embedding, each layer, and the rest."""

from collections.abc import Mapping
from dataclasses import dataclass

from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.expected_tensors import EMBEDDING, FINAL_NORM, HEAD
from gemma_awq_cli.models.gemma.layers import Linear


@dataclass(frozen=True)
class SourcePart:
    """Some tensors by their names in transformers' causal model.

    layer: the index of the layer, or None. packed: 4-bit linears by their module's name; kept: the shapes of all other
    tensors.
    """

    name: str
    layer: int | None
    packed: Mapping[str, Linear]
    kept: Mapping[str, tuple[int, ...]]


def source_parts(checkpoint: Checkpoint) -> tuple[SourcePart, ...]:
    """Return every tensor of the language model exactly once. A tied head has no tensor."""
    shape = checkpoint.shape
    table = (shape.vocabulary, shape.hidden)
    parts = [SourcePart("embedding", None, {}, {EMBEDDING: table})]
    for index, layout in enumerate(shape.layouts):
        prefix = f"model.layers.{index}."
        kept: dict[str, tuple[int, ...]] = {
            f"{prefix}{norm.name}.weight": (norm.size,) for norm in layout.norms.values()
        }
        kept |= {f"{prefix}{name}.bias": (one.outputs,) for name, one in layout.linears.items() if one.bias}
        kept |= {f"{prefix}{name}": size for name, size in layout.kept.items()}
        packed = {f"{prefix}{name}": linear for name, linear in layout.packed().items()}
        parts.append(SourcePart(f"layer {index}", index, packed, kept))
    rest: dict[str, tuple[int, ...]] = {FINAL_NORM: (shape.hidden,), **shape.outer()}
    if not checkpoint.tied_head:
        rest[HEAD] = table
    return (*parts, SourcePart("outside the layers", None, {}, rest))
