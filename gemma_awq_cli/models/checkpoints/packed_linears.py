"""A checkpoint's packed linears: which there are, and reading them in one layout whatever the file's is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np

from gemma_awq_cli.awq.packed_arrays import PackedArrays, split_groups
from gemma_awq_cli.models.checkpoints.expected_tensors import HEAD, OTHER_SOURCE, require_tensors
from gemma_awq_cli.models.checkpoints.headers import TensorInfo
from gemma_awq_cli.models.checkpoints.weight_files import read_arrays, require_finite_array
from gemma_awq_cli.models.gemma.architecture import TextShape
from gemma_awq_cli.models.gemma.layers import LayerLayout, Linear
from gemma_awq_cli.models.packed_formats.packed_format import Expected, PackedFormat, require_fits

LARGEST_GROUP = 256  # that kernels read; larger ones are read in parts
_PART = 128


@dataclass(frozen=True)
class PackedLinears:
    """The packed linears of a checkpoint, checked against its config from the files' headers.

    layers: for each layer those that are packed, by their names in the layer; the others of its layout have 16 bits.
    head: whether the head is packed; group_size: of all that `read` returns, though files may mix several.
    expected: the tensors of all packed linears, by their names in the files.
    """

    layout: PackedFormat
    layers: tuple[Mapping[str, Linear], ...]
    head: Linear | None
    group_size: int
    expected: Mapping[str, Expected]
    _tensors: Mapping[str, TensorInfo]
    _key: Callable[[str], str]

    def read(self, linears: Mapping[str, Linear]) -> dict[str, PackedArrays]:
        """Linears by their full names (`model.layers.0.mlp.up_proj`), in AutoAWQ's GEMM layout.

        Every file is opened once: experts are thousands. Scales are checked to be finite.
        """
        kinds = {name: self._kinds(name) for name in linears}
        read = read_arrays(self._tensors, (key for keys in kinds.values() for key in keys.values()))
        found = {}
        for name, linear in linears.items():
            base = _base(self._key, name)
            packed = self.layout.read(base, linear, {kind: read[key] for kind, key in kinds[name].items()})
            # a scale is a factor of integers up to 15: none that float16 cannot hold is sound
            with np.errstate(over="ignore"):
                narrow = packed.scales.astype(np.float16, copy=False)
            require_finite_array(f"{base}{self._scales}", narrow)
            stored = linear.inputs // packed.scales.shape[0]
            found[name] = split_groups(packed, stored // self.group_size)
        return found

    @property
    def _scales(self) -> str:
        return next(kind for kind in self.layout.kinds if "scale" in kind)

    def _kinds(self, name: str) -> dict[str, str]:
        """The tensors of one linear: the end of each one's name -> its name in the files."""
        base = _base(self._key, name)
        return {kind: base + kind for kind in self.layout.kinds if base + kind in self.expected}


def find_packed_linears(
    layout: PackedFormat,
    tensors: Mapping[str, TensorInfo],
    key: Callable[[str], str],
    shape: TextShape,
    tied_head: bool,
    where: object,
) -> PackedLinears:
    """The packed linears of a checkpoint; an error if tensors of theirs are missing or have other shapes.

    key: a name in transformers' causal model -> the name in the files; where: the checkpoint, for errors.
    """
    layers = tuple(_packed_in(index, one, layout.marker, tensors, key) for index, one in enumerate(shape.layouts))
    head = Linear(shape.vocabulary, shape.hidden)
    packed_head = not tied_head and _base(key, HEAD.removesuffix(".weight")) + layout.marker in tensors
    named = {f"model.layers.{index}.{name}": one for index, layer in enumerate(layers) for name, one in layer.items()}
    if packed_head:
        named[HEAD.removesuffix(".weight")] = head
    expected: dict[str, Expected] = {}
    groups = set()
    for name, linear in named.items():
        base = _base(key, name)
        there = {kind: tensors[base + kind].shape for kind in layout.kinds if base + kind in tensors}
        group_size = layout.groups(linear, there)
        require_fits(base, linear, group_size, layout.title, OTHER_SOURCE)
        groups.add(group_size)
        expected |= {base + kind: one for kind, one in layout.expected(linear, group_size, there).items()}
    require_tensors(tensors, expected, where)
    return PackedLinears(layout, layers, head if packed_head else None, _common(groups), expected, tensors, key)


def _packed_in(
    index: int, layout: LayerLayout, marker: str, tensors: Mapping[str, TensorInfo], key: Callable[[str], str]
) -> dict[str, Linear]:
    """The linears of one layer that are packed. One that is there in neither form counts as packed, and is missed so.

    Experts are packed all together or not at all: 16-bit files stack them in one tensor.
    """
    prefix = f"model.layers.{index}."
    places = layout.places()
    linears = layout.packed()
    experts = [name for name in linears if name not in layout.linears]
    marked = {name for name in linears if _base(key, prefix + name) + marker in tensors}
    some_experts = not marked.isdisjoint(experts)

    def is_packed(name: str) -> bool:
        if name not in layout.linears and some_experts:
            return True
        return name in marked or key(prefix + places[name].tensor) not in tensors

    return {name: linear for name, linear in linears.items() if is_packed(name)}


def _base(key: Callable[[str], str], name: str) -> str:
    """What the names of a linear's tensors begin with in the files."""
    return key(f"{name}.weight").removesuffix(".weight")


def _common(groups: Sequence[int] | set[int]) -> int:
    """The largest group size that divides all others and that kernels read."""
    common = gcd(*groups)
    return common if common <= LARGEST_GROUP else gcd(common, _PART)
