"""A language model as the structures that C++ reads: the weights of the compiled decoder.

Its integer linears quantize their activations to 8 bits, one scale per token and 32 inputs.
"""

import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gemma_awq_cli.kernels.head_kinds import head_group
from gemma_awq_cli.kernels.native import linear as native
from gemma_awq_cli.kernels.native.library import Library
from gemma_awq_cli.kernels.native.structures import (
    BF16,
    INT4,
    INT4_BY_INPUT,
    INT8,
    MAX_HEAD_DIM,
    MAX_STREAMS,
    LayerSpec,
    LinearSpec,
    ModelSpec,
)
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.weight_files import release
from gemma_awq_cli.models.forward.decoder_weights import (
    JOINED,
    LayerReader,
    embed_scale,
    joined_linears,
    read_embedding,
    read_final_gain,
    read_per_layer,
    read_streams,
)
from gemma_awq_cli.models.forward.native_layers import (
    NativeLayer,
    layer_arena_bytes,
    layer_spec,
    linear_array,
    narrow,
    read_native_layer,
)
from gemma_awq_cli.models.gemma.architecture import PER_LAYER_TABLE, Architecture
from gemma_awq_cli.models.gemma.layers import LayerLayout, Linear
from gemma_awq_cli.system.arrays import Array, address
from gemma_awq_cli.system.threads import thread_count

if TYPE_CHECKING:
    from gemma_awq_cli.models.forward.torch_layers import TextWeights

# What engine.cpp implements of `models.gemma.features.FEATURES`.
FEATURES = frozenset({
    "post_norms", "qk_norm", "attention_softcap", "final_softcap", "sliding_window", "value_norm", "keys_are_values",
    "shared_kv", "per_layer_inputs", "layer_scalar", "altup", "sparse_gate", "experts",
})  # fmt: skip
MANY_TOKENS = 16  # of 16-bit weights: from this many at once on, torch is faster where `torch_is_faster`
_VECTOR = 16  # floats that C++ handles at a time; head sizes and MLP widths must be multiples of it
_HEAD_KINDS = {"int8": INT8, "int4": INT4}
_WEIGHTS = {INT4: "int4", INT4_BY_INPUT: "int4", INT8: "int8", BF16: "bfloat16"}
_ACTIVATIONS = {INT4: "int8", INT4_BY_INPUT: "int8", INT8: "int8", BF16: "float32"}


@dataclass(frozen=True)
class NativePerLayer:
    """The per-layer inputs: the table [vocabulary, layers * width] bf16, mapped; the projection; the gain [width]."""

    table: Array
    projection: native.NativeLinear
    gain: Array


@dataclass(frozen=True)
class NativeStreams:
    """What makes AltUp's further streams of the embedded token, and what joins all at the end."""

    starts: tuple[native.NativeLinear, ...]
    ends: tuple[native.NativeLinear, ...]


@dataclass(frozen=True)
class NativeText:
    """A language model for the compiled decoder.

    spec: what C++ reads; it points into all that follows. embedding, exact_head: bf16 [V, hidden]; norm: the final gain
    [hidden] float32; dense: the same 16-bit weights for the torch decoder where it reads many tokens faster, or None.
    """

    library: Library
    arch: Architecture
    spec: ModelSpec
    layers: tuple[NativeLayer, ...]
    head: native.NativeLinear
    embedding: Array
    exact_head: Array
    norm: Array
    per_layer: NativePerLayer | None
    streams: NativeStreams | None
    dense: "TextWeights | None"

    @property
    def linears(self) -> tuple[native.NativeLinear, ...]:
        """The linears of all layers, in order, those of experts included, but not those that always have 16 bits."""
        return tuple(linear for layer in self.layers for linear in layer.wide_linears())

    def token_linears(self) -> list[native.NativeLinear]:
        """The linears that one token reads, in no particular order; of experts any that it could be sent to."""
        read = [self.head]
        for layer, layout in zip(self.layers, self.arch.layouts, strict=True):
            read += layer.token_linears(layout.experts.active if layout.experts else 0)
        read += [self.per_layer.projection] if self.per_layer else []
        return read + ([*self.streams.starts, *self.streams.ends] if self.streams else [])


def native_refusal(checkpoint: Checkpoint, arch: Architecture) -> str | None:
    """Why the compiled decoder cannot take this model's sizes or dtypes, or None."""
    group_size = checkpoint.group_size
    for index, layout in enumerate(arch.layouts):
        if reason := _layer_refusal(layout, group_size) or _mixed(layout, checkpoint.packed(index)):
            return reason
    if arch.altup is not None and arch.altup.streams > MAX_STREAMS:
        return f"{arch.altup.streams} streams are more than {MAX_STREAMS}"
    if arch.per_layer is not None and checkpoint.tensors[checkpoint.key(PER_LAYER_TABLE)].stored != "BF16":
        return "it reads per-layer embeddings in bfloat16 only"
    if group_size is not None:
        return None
    others = {checkpoint.tensors[name].dtype_name for name in checkpoint.text_tensors()} - {"bfloat16"}
    return f"it reads 16-bit weights in bfloat16 only, and this checkpoint has {min(others)}" if others else None


def _layer_refusal(layout: LayerLayout, group_size: int | None) -> str | None:
    experts = layout.experts
    widths = [layout.head_dim, layout.intermediate, layout.per_layer_width, experts.intermediate if experts else 0]
    if any(width % _VECTOR for width in widths):
        others = f", experts of {experts.intermediate}" if experts else ""
        others += f", per-layer inputs of {layout.per_layer_width}" if layout.per_layer_width else ""
        return (
            f"heads of {layout.head_dim} or an MLP of {layout.intermediate}{others} do not fit its vectors of {_VECTOR}"
        )
    if layout.head_dim > MAX_HEAD_DIM:
        return f"heads of {layout.head_dim} are larger than {MAX_HEAD_DIM}"
    if group_size is None:
        return None
    inputs = [linear.inputs for linear in layout.linears.values()]
    inputs += [experts.hidden, experts.intermediate] if experts else []
    return next((reason for size in inputs if (reason := native.refusal(size, group_size))), None)


def _mixed(layout: LayerLayout, packed: Mapping[str, Linear]) -> str | None:
    """Why a layer of which only some linears are packed cannot be read, or None."""
    for names in joined_linears(layout).values() if packed else ():
        if len({name in packed for name in names}) > 1:
            return f"of {', '.join(names)} only some are packed"
    return None


def torch_is_faster(library: Library) -> bool:
    """Whether torch multiplies many tokens with 16-bit weights faster than the kernels do.

    On x86-64 it needs the processor's instructions for bfloat16; without, it expands the weights each time, and 16 to
    1024 tokens take 0.4 to 1.0 times as long in the kernels. Other processors were not measured.
    """
    return library.multiplies_bfloat16 or platform.machine().lower() not in ("x86_64", "amd64")


def read_native_text(library: Library, checkpoint: Checkpoint, arch: Architecture, head: str) -> NativeText:
    """Read all weights of the language model: packed ones are repacked for C++, 16-bit ones stay mapped.

    head: one of `kernels.head.HEADS`.
    """
    group_size = checkpoint.group_size
    embedding, exact_head = map(native.as_bfloat16, read_embedding(checkpoint))
    head_kind = _HEAD_KINDS.get(head, BF16)
    group = head_group(head, arch.hidden) if head_kind != BF16 else None
    if group is None:
        head_kind = BF16
    arena = native.Arena(library, _arena_bytes(checkpoint, arch, head_kind, group))
    # layers with one rope share one array, by which C++ knows that they share their angles
    frequencies = {id(rope): np.ascontiguousarray(rope.inv_freq, np.float32) for rope in arch.ropes}
    layers = tuple(
        read_native_layer(library, LayerReader(checkpoint, arch, index), frequencies[id(rope)], arena)
        for index, rope in enumerate(arch.ropes)
    )
    norm = read_final_gain(checkpoint, arch)
    if group is None:
        head_linear = native.dense([exact_head])
    else:
        head_linear = native.quantized(library, exact_head, head_kind, group, arena, release)
    dense = None
    if group_size is None and torch_is_faster(library):
        import torch

        from gemma_awq_cli.models.forward.torch_weights import read_torch_text

        dense = read_torch_text(checkpoint, arch, torch.device("cpu"), torch.bfloat16)
    per_layer, streams = (
        _read_per_layer(checkpoint, arch, group_size, arena),
        _read_streams(checkpoint, arch, group_size, arena),
    )
    spec = _model_spec(arch, layers, embedding, norm, head_linear.spec, exact_head, per_layer, streams)
    return NativeText(library, arch, spec, layers, head_linear, embedding, exact_head, norm, per_layer, streams, dense)


def _read_per_layer(
    checkpoint: Checkpoint, arch: Architecture, group_size: int | None, arena: native.Arena
) -> NativePerLayer | None:
    if (read := read_per_layer(checkpoint, arch)) is None:
        return None
    return NativePerLayer(read.table, narrow(read.projection, group_size, arena), read.gain)


def _read_streams(
    checkpoint: Checkpoint, arch: Architecture, group_size: int | None, arena: native.Arena
) -> NativeStreams | None:
    if (read := read_streams(checkpoint, arch)) is None:
        return None
    starts, ends = (tuple(narrow(one, group_size, arena) for one in part) for part in (read.starts, read.ends))
    return NativeStreams(starts, ends)


def native_report(text: NativeText) -> list[str]:
    """A line each on the forward, the layers' linears and the head."""
    long = "" if text.dense is None else f"; torch for {MANY_TOKENS} tokens or more at once"
    linears = sum(linear.nbytes for linear in text.linears)
    exact = "; the largest logits recomputed in bfloat16" if text.spec.exact else ""
    experts = next((layout.experts for layout in text.arch.layouts if layout.experts), None)
    names = JOINED if experts is None else (*JOINED, f"{experts.active} of {experts.count} experts per token")
    origin = "prebuilt, " if text.library.sources else ""
    lines = [
        f"forward: compiled C++ ({text.library.instructions}, {origin}{thread_count()} threads){long}",
        f"{', '.join(names)}: compiled {_each_arithmetic(text.linears)}, {linears / 1e6:.1f} MB",
        f"head: compiled {_arithmetic(text.head.spec)}{exact}, {text.head.nbytes / 1e6:.1f} MB",
    ]
    if text.per_layer is not None:
        lines.append(f"per-layer embeddings: read row by row from the file, {text.per_layer.table.nbytes / 1e6:.1f} MB")
    return lines


def _each_arithmetic(linears: Sequence[native.NativeLinear]) -> str:
    """What most linears compute in, and how many compute in something else."""
    (usual, _), *others = Counter(_arithmetic(linear.spec) for linear in linears).most_common()
    rest = "".join(f"; {number} of {len(linears)} {name}" for name, number in others)
    return f"{usual}{rest}"


def _arithmetic(linear: LinearSpec) -> str:
    groups = f" in groups of {linear.group}" if linear.group else ""
    return f"{_WEIGHTS[linear.kind]}{groups}, activations in {_ACTIVATIONS[linear.kind]}"


def _model_spec(
    arch: Architecture,
    layers: Sequence[NativeLayer],
    embedding: Array,
    norm: Array,
    head: LinearSpec,
    exact_head: Array,
    per_layer: NativePerLayer | None,
    streams: NativeStreams | None,
) -> ModelSpec:
    """exact_head: the head in bf16, from which C++ recomputes the largest logits of an int4 head."""
    specs = (LayerSpec * len(layers))(*(layer_spec(arch, index, layer) for index, layer in enumerate(layers)))
    spec = ModelSpec(
        hidden=arch.hidden, layers=len(layers), eps=arch.eps,
        kv_buffers=1 + len(arch.kv_sources), first_kv_reader=arch.first_kv_reader,
        embed_scale=embed_scale(arch),
        attention_softcap=arch.attention_softcap or 0.0, final_softcap=arch.final_softcap or 0.0,
        embedding=address(embedding), norm=address(norm), head=head, layer=specs,
        exact=address(exact_head) if head.kind == INT4 else None,
    )  # fmt: skip
    if per_layer is not None:
        assert arch.per_layer is not None
        spec.per_layer_width, spec.per_layer_rows = arch.per_layer.width, arch.per_layer.vocabulary
        spec.per_layer_table, spec.per_layer_gain = address(per_layer.table), address(per_layer.gain)
        spec.per_layer_projection = per_layer.projection.spec
    if streams is not None:
        assert arch.altup is not None
        spec.streams, spec.active_stream = arch.altup.streams, arch.altup.active
        spec.stream_starts, spec.stream_ends = linear_array(streams.starts), linear_array(streams.ends)
    return spec


def _arena_bytes(checkpoint: Checkpoint, arch: Architecture, head_kind: int, head_group_size: int | None) -> int:
    """How many bytes all weights take together that are not mapped."""
    total = 0
    if (group_size := checkpoint.group_size) is not None:
        for index, layout in enumerate(arch.layouts):
            total += layer_arena_bytes(layout, checkpoint.packed(index).keys(), group_size)
        for name, shape in arch.outer().items():
            if len(shape) == 2 and name != PER_LAYER_TABLE:
                total += native.arena_bytes(BF16, shape[1], shape[0], 0)
    if head_group_size is not None:
        total += native.arena_bytes(head_kind, arch.hidden, arch.vocabulary, head_group_size)
    return total
