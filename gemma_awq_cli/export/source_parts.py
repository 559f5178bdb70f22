"""A packed checkpoint's language model in parts of bounded size: the embedding, each layer, and the rest."""

from collections.abc import Mapping
from dataclasses import dataclass

from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.expected_tensors import EMBEDDING, HEAD, text_tensors
from gemma_awq_cli.models.gemma.layers import Linear

HEAD_MODULE = HEAD.removesuffix(".weight")


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
    found = checkpoint.packed_linears
    layers = found.layers if found is not None else ()
    kept = {name: one.shape for name, one in text_tensors(checkpoint.shape, checkpoint.tied_head, layers).items()}
    parts = [SourcePart("embedding", None, {}, {EMBEDDING: kept.pop(EMBEDDING)})]
    for index in range(checkpoint.layers):
        prefix = f"model.layers.{index}."
        packed = {f"{prefix}{name}": linear for name, linear in checkpoint.packed(index).items()}
        own = {name: kept.pop(name) for name in [name for name in kept if name.startswith(prefix)]}
        parts.append(SourcePart(f"layer {index}", index, packed, own))
    head = None if found is None else found.head
    if head is not None:
        del kept[HEAD]
    return (*parts, SourcePart("outside the layers", None, {} if head is None else {HEAD_MODULE: head}, kept))
