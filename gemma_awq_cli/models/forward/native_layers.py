"""One layer as the structures that C++ reads, with the arrays that they point into."""

from collections.abc import Mapping, Sequence, Set
from ctypes import pointer
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from gemma_awq_cli.awq.packed_arrays import PackedArrays
from gemma_awq_cli.kernels.native import linear as native
from gemma_awq_cli.kernels.native.library import Library
from gemma_awq_cli.kernels.native.structures import (
    BF16,
    INT4,
    INT4_BY_INPUT,
    AltUpSpec,
    ExpertsSpec,
    LayerSpec,
    LinearSpec,
)
from gemma_awq_cli.models.forward.decoder_weights import EXPERT_JOINED, JOINED, LayerReader, joined_linears
from gemma_awq_cli.models.gemma.architecture import Architecture
from gemma_awq_cli.models.gemma.layers import LayerLayout
from gemma_awq_cli.system.arrays import BFLOAT16, Array, address

# Tensors of a layout's `kept` that C++ multiplies with as 16-bit linears; the others it reads as numbers in float32.
_NARROW = (
    "per_layer_input_gate.weight", "per_layer_projection.weight", "laurel.linear_left.weight",
    "laurel.linear_right.weight", "router.proj.weight",
)  # fmt: skip


# From this share of zeros on it is faster to read weights input by input: three times as fast at 95 %, for one token.
_SPARSE = 0.9


@dataclass(frozen=True)
class NativeLayer:
    """One layer's packed or mapped linears and the arrays that C++ reads in place.

    linears: by their names in `JOINED`; experts: those of each expert, by their names in `EXPERT_JOINED`; narrow and
    numbers: 16-bit linears and float32 arrays, by their names in the layout's `kept`; gains: float32, by slot.
    """

    linears: Mapping[str, native.NativeLinear]
    experts: Mapping[str, tuple[native.NativeLinear, ...]]
    narrow: Mapping[str, native.NativeLinear]
    numbers: Mapping[str, Array]
    gains: Mapping[str, Array]
    inv_freq: Array

    def wide_linears(self) -> list[native.NativeLinear]:
        """The linears that an artifact packs."""
        return [*self.linears.values(), *(linear for part in self.experts.values() for linear in part)]

    def token_linears(self, active: int) -> list[native.NativeLinear]:
        """The linears that a token reads. active: how many experts it is sent to."""
        experts = [linear for part in self.experts.values() for linear in part[:active]]
        return [*self.linears.values(), *experts, *self.narrow.values()]


def read_native_layer(library: Library, reader: LayerReader, inv_freq: Array, arena: native.Arena) -> NativeLayer:
    """Read one layer: packed linears are repacked into the arena, 16-bit ones stay mapped."""
    kept = reader.kept()
    numbers = {name: _floats(array) for name, array in kept.items() if name not in _NARROW}
    gains = {slot: gain for slot, gain in reader.gains().items() if gain is not None}
    hidden = reader.arch.hidden
    if "router.scale" in numbers:  # the norm before the router has no gain of its own
        numbers["router.scale"] = numbers["router.scale"] * np.float32(hidden**-0.5)
    if "router_norm" in gains:
        gains["router_norm"] = gains["router_norm"] * np.float32(hidden**-1.0)
    return NativeLayer(
        linears={kind: _linear(library, reader, kind, arena) for kind in JOINED},
        experts=_experts(library, reader, arena),
        narrow={name: narrow(kept[name], reader.checkpoint.group_size, arena) for name in _NARROW if name in kept},
        numbers=numbers,
        gains=gains,
        inv_freq=inv_freq,
    )


def narrow(weight: Array, group_size: int | None, arena: native.Arena) -> native.NativeLinear:
    """A linear that always has 16 bits: beside packed ones in the arena, or mapped from its file like all others."""
    if group_size is not None:
        return native.copied(weight, arena)
    return native.dense([native.as_bfloat16(weight)])


def linear_array(linears: Sequence[native.NativeLinear]) -> Any:
    """Linears as an array of structures."""
    return (LinearSpec * len(linears))(*(linear.spec for linear in linears))


def layer_arena_bytes(layout: LayerLayout, packed: Set[str], group_size: int) -> int:
    """How many bytes of an `Arena` one layer takes. packed: the names of the linears that are packed."""
    total = 0
    for kind, names in joined_linears(layout).items():
        if names[0] not in packed:  # it stays where the file is mapped
            continue
        linear = layout.joined(names)
        total += native.arena_bytes(_int4_kind(layout, kind), linear.inputs, linear.outputs, group_size)
    for name in _NARROW:
        outputs, inputs = layout.kept.get(name, (0, 0))
        total += native.arena_bytes(BF16, inputs, outputs, 0)
    experts = layout.experts
    if experts is not None and not packed.isdisjoint(experts.linears(0)):
        for inputs, outputs in ((experts.hidden, 2 * experts.intermediate), (experts.intermediate, experts.hidden)):
            total += experts.count * native.arena_bytes(INT4, inputs, outputs, group_size)
    return total


def layer_spec(arch: Architecture, index: int, layer: NativeLayer) -> LayerSpec:
    """The structure of layer `index`; `layer` must outlive it."""
    layout, rope = arch.layouts[index], arch.ropes[index]
    if layer.inv_freq.size != layout.head_dim // 2:
        raise AssertionError(f"layer {index} has {layer.inv_freq.size} frequencies for heads of {layout.head_dim}")
    source = index if layout.kv_source is None else layout.kv_source
    buffers = {layer: buffer for buffer, layer in enumerate(sorted(arch.kv_sources), 1)}
    scalar = layer.numbers.get("layer_scalar")
    spec = LayerSpec(
        heads=layout.heads, kv_heads=layout.kv_heads, head_dim=layout.head_dim, intermediate=layout.intermediate,
        window=layout.window or 0, inv_freq=address(layer.inv_freq), rope_factor=rope.factor,
        query_scale=arch.query_scale,
        kv_buffer=buffers.get(source, 0), reads_kv=int(layout.kv_source is not None),
        keys_are_values=int(layout.keys_are_values), value_norm=int(layout.value_norm),
        sparse_gate=int(layout.sparsity > 0), gate_cut=_deviations(layout.sparsity),
        scalar=1.0 if scalar is None else float(scalar.item()),
        **{kind: linear.spec for kind, linear in layer.linears.items()},
        **{slot: address(gain) for slot, gain in layer.gains.items() if slot in _LAYER_GAINS},
    )  # fmt: skip
    if layout.per_layer_width:
        spec.per_layer_gate = layer.narrow["per_layer_input_gate.weight"].spec
        spec.per_layer_projection = layer.narrow["per_layer_projection.weight"].spec
    if layout.experts is not None:
        spec.experts = pointer(_experts_spec(layout, layer))
    if arch.altup is not None:
        spec.altup = pointer(_altup_spec(arch.altup.scaled, layer))
    return spec


_LAYER_GAINS = {field[0] for field in LayerSpec._fields_}


def _deviations(sparsity: float) -> float:
    """How many standard deviations above its mean a gate is cut off, rounded as transformers rounds it."""
    return float(BFLOAT16.type(NormalDist().inv_cdf(sparsity))) if sparsity else 0.0


def _experts_spec(layout: LayerLayout, layer: NativeLayer) -> ExpertsSpec:
    assert layout.experts is not None
    return ExpertsSpec(
        count=layout.experts.count, active=layout.experts.active, intermediate=layout.experts.intermediate,
        router=layer.narrow["router.proj.weight"].spec,
        router_gain=address(layer.numbers["router.scale"]),
        scale=address(layer.numbers["router.per_expert_scale"]),
        norm=address(layer.gains["experts_norm"]), post_norm=address(layer.gains["post_experts_norm"]),
        dense_norm=address(layer.gains["dense_norm"]),
        gate_up=linear_array(layer.experts["gate_up"]), down=linear_array(layer.experts["down"]),
    )  # fmt: skip


def _altup_spec(scaled: bool, layer: NativeLayer) -> AltUpSpec:
    numbers = layer.numbers
    return AltUpSpec(
        router=address(numbers["altup.modality_router.weight"]), router_gain=address(layer.gains["router_norm"]),
        prediction=address(numbers["altup.prediction_coefs.weight"]),
        correction=address(numbers["altup.correction_coefs.weight"]),
        output_scale=address(numbers["altup.correct_output_scale"]) if scaled else None,
        laurel_left=layer.narrow["laurel.linear_left.weight"].spec,
        laurel_right=layer.narrow["laurel.linear_right.weight"].spec,
        laurel_norm=address(layer.gains["laurel_norm"]),
    )  # fmt: skip


def _linear(library: Library, reader: LayerReader, kind: str, arena: native.Arena) -> native.NativeLinear:
    dense = []
    for part in reader.parts(kind):
        if isinstance(part, PackedArrays):  # all of it: `native_refusal` refuses mixtures
            return native.from_awq(library, part, arena, _int4_kind(reader.layout, kind))
        dense.append(native.as_bfloat16(part))
    return native.dense(dense)


def _int4_kind(layout: LayerLayout, kind: str) -> int:
    """How the linears of one of `JOINED` are packed: by input where nearly all inputs are zero."""
    return INT4_BY_INPUT if kind == "down" and layout.sparsity >= _SPARSE else INT4


def _experts(library: Library, reader: LayerReader, arena: native.Arena) -> dict[str, tuple[native.NativeLinear, ...]]:
    if reader.layout.experts is None:
        return {}
    if not reader.packs_experts:
        return {kind: tuple(native.dense([one]) for one in reader.dense_experts(kind)) for kind in EXPERT_JOINED}
    numbers = range(reader.layout.experts.count)
    return {
        kind: tuple(native.from_awq(library, reader.packed_expert(number, kind), arena) for number in numbers)
        for kind in EXPERT_JOINED
    }


def _floats(array: Array) -> Array:
    return np.ascontiguousarray(array, np.float32)
