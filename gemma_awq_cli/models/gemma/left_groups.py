"""Groups of linears that an artifact may leave in 16 bits, and the names by which other readers find them.

Readers join linears that share an input (q, k and v; gate and up) into one, so all of them are packed or none. These
are the scale groups of a layer.
"""

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from math import prod

from gemma_awq_cli.models.gemma.layers import LayerLayout

# What vLLM and SGLang call the joined linears of a group.
_JOINED = {"qkv": "self_attn.qkv_proj", "gate_up": "mlp.gate_up_proj"}
_JOINED_LINEARS = {"qkv": 3}  # fewer, and readers fill what is missing in ways of their own


@dataclass(frozen=True)
class LeftGroup:
    """A group of layer `layer` that is left in 16 bits, or may be. linears: their names in the layer."""

    layer: int
    name: str
    linears: tuple[str, ...]

    @property
    def modules(self) -> tuple[str, ...]:
        """The names of the linears in transformers' causal model: `model.layers.0.mlp.gate_proj`."""
        return tuple(f"model.layers.{self.layer}.{name}" for name in self.linears)

    def weights(self, layouts: Sequence[LayerLayout]) -> int:
        """Return how many weights the linears have."""
        linears = layouts[self.layer].linears
        return sum(prod((linears[name].outputs, linears[name].inputs)) for name in self.linears)


def leavable_groups(layouts: Sequence[LayerLayout]) -> list[LeftGroup]:
    """Return the groups that every reader takes in 16 bits, layer by layer.

    Experts are not among them, nor the attention inputs of a layer without keys or values of its own.
    """
    return [
        LeftGroup(index, group.name, group.linears)
        for index, layout in enumerate(layouts)
        for group in layout.groups
        if len(group.linears) >= _JOINED_LINEARS.get(group.name, 1)
    ]


def find_left_groups(layouts: Sequence[LayerLayout], packed: Sequence[Set[str]]) -> tuple[list[LeftGroup], list[str]]:
    """Return the groups that are in 16 bits as a whole, and other linears that are, by their names in the causal model.

    packed: for each layer the names of the linears that are packed.
    """
    groups = [one for one in leavable_groups(layouts) if not packed[one.layer] & set(one.linears)]
    known = {name for one in groups for name in one.modules}
    others = [
        name
        for index, layout in enumerate(layouts)
        for name in (f"model.layers.{index}.{linear}" for linear in layout.packed() if linear not in packed[index])
        if name not in known
    ]
    return groups, others


def not_converted_names(groups: Iterable[LeftGroup]) -> list[str]:
    """Return the entries of `modules_to_not_convert` that groups in 16 bits take.

    transformers matches an entry as the end of a module's name, vLLM and SGLang anywhere in it. vLLM asks for every
    linear that it joins; SGLang knows only the name of the joined one.
    """
    listed = list(groups)
    own = [f"layers.{group.layer}.{name}" for group in listed for name in group.linears]
    return own + joined_names(listed)


def joined_names(groups: Iterable[LeftGroup]) -> list[str]:
    """Return those entries of `not_converted_names` that name what readers join the linears of groups into."""
    return [f"layers.{group.layer}.{_JOINED[group.name]}" for group in groups if group.name in _JOINED]
