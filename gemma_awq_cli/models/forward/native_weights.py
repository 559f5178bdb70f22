"""A language model as the structures that C++ reads: the weights of the compiled decoder.

Its integer linears quantize their activations to 8 bits, one scale per token and group.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_awq_cli.kernels.head import head_group
from gemma_awq_cli.kernels.native import linear as native
from gemma_awq_cli.kernels.native.library import Library
from gemma_awq_cli.kernels.native.structures import BF16, INT4, INT8, MAX_HEAD_DIM, LayerSpec, LinearSpec, ModelSpec
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward.decoder_weights import (
    JOINED,
    LayerReader,
    embed_scale,
    joined_linears,
    read_embedding,
    read_final_gain,
)
from gemma_awq_cli.models.forward.torch_decoder import TextWeights
from gemma_awq_cli.models.forward.torch_weights import read_torch_text
from gemma_awq_cli.models.gemma.architecture import Architecture

# What engine.cpp implements of `models.gemma.features.FEATURES`.
FEATURES = frozenset({"post_norms", "qk_norm", "attention_softcap", "final_softcap", "sliding_window"})
MANY_TOKENS = 16  # from this many at once on, torch's bf16 product is faster than the kernel for 16-bit weights
_VECTOR = 16  # floats that C++ handles at a time; head sizes and MLP widths must be multiples of it
_HEAD_KINDS = {"int8": INT8, "int4": INT4}
_WEIGHTS = {INT4: "int4", INT8: "int8", BF16: "bfloat16"}
_ACTIVATIONS = {INT4: "int8 per group", INT8: "int8 per group", BF16: "float32"}


@dataclass(frozen=True)
class NativeLayer:
    """One layer's packed or mapped linears by their names in `JOINED`, and the tensors that C++ reads in place."""

    linears: Mapping[str, native.NativeLinear]
    gains: Mapping[str, Tensor]
    inv_freq: Tensor


@dataclass(frozen=True)
class NativeText:
    """A language model for the compiled decoder.

    spec: what C++ reads; it points into all that follows. embedding, exact_head: bf16 [V, hidden]; norm: the final gain
    [hidden] float32; dense: the same 16-bit weights for the torch decoder, None for an artifact.
    """

    library: Library
    arch: Architecture
    spec: ModelSpec
    layers: tuple[NativeLayer, ...]
    head: native.NativeLinear
    embedding: Tensor
    exact_head: Tensor
    norm: Tensor
    dense: TextWeights | None

    @property
    def linears(self) -> tuple[native.NativeLinear, ...]:
        """The linears of all layers, in order."""
        return tuple(linear for layer in self.layers for linear in layer.linears.values())


def native_refusal(checkpoint: Checkpoint, arch: Architecture, group_size: int | None) -> str | None:
    """Why the compiled decoder cannot take this model's sizes or dtypes, or None."""
    for layout in arch.layouts:
        if layout.head_dim % _VECTOR or layout.intermediate % _VECTOR:
            return f"heads of {layout.head_dim} or an MLP of {layout.intermediate} do not fit its vectors of {_VECTOR}"
        if layout.head_dim > MAX_HEAD_DIM:
            return f"heads of {layout.head_dim} are larger than {MAX_HEAD_DIM}"
        if group_size is not None:
            inputs = [linear.inputs for linear in layout.linears.values()]
            if refusals := [reason for size in inputs if (reason := native.refusal(size, group_size))]:
                return refusals[0]
    if group_size is not None:
        return None
    others = {checkpoint.tensors[name].dtype for name in checkpoint.text_tensors()} - {torch.bfloat16}
    return (
        f"it reads 16-bit weights in bfloat16 only, and this checkpoint has {min(map(str, others))}" if others else None
    )


def read_native_text(
    library: Library, checkpoint: Checkpoint, arch: Architecture, group_size: int | None, head: str
) -> NativeText:
    """Read all weights of the language model: packed ones are repacked for C++, 16-bit ones stay mapped.

    group_size: None for a 16-bit checkpoint; head: one of `kernels.head.HEADS`.
    """
    embedding, exact_head = (tensor.to(torch.bfloat16).contiguous() for tensor in read_embedding(checkpoint))
    head_kind = _HEAD_KINDS.get(head, BF16)
    group = head_group(head, arch.hidden) if head_kind != BF16 else None
    if group is None:
        head_kind = BF16
    arena = native.Arena(library, _arena_bytes(arch, group_size, head_kind, group))
    layers = _read_layers(library, checkpoint, arch, group_size, arena)
    norm = read_final_gain(checkpoint, arch)
    if group is None:
        head_linear = native.dense([exact_head])
    else:
        head_linear = native.quantized(library, exact_head, head_kind, group, arena)
    dense = None
    if group_size is None:
        dense = read_torch_text(checkpoint, arch, None, torch.device("cpu"), torch.bfloat16)
    spec = _model_spec(arch, layers, embedding, norm, head_linear.spec, exact_head)
    return NativeText(library, arch, spec, layers, head_linear, embedding, exact_head, norm, dense)


def native_report(text: NativeText) -> list[str]:
    """A line each on the forward, the layers' linears and the head."""
    long = "" if text.dense is None else f"; torch for {MANY_TOKENS} tokens or more at once"
    linears = sum(linear.nbytes for linear in text.linears)
    exact = "; the largest logits recomputed in bfloat16" if text.spec.exact else ""
    return [
        f"forward: compiled C++ ({text.library.instructions}, {torch.get_num_threads()} threads){long}",
        f"{', '.join(JOINED)}: compiled {_arithmetic(text.linears[0].spec)}, {linears / 1e6:.1f} MB",
        f"head: compiled {_arithmetic(text.head.spec)}{exact}, {text.head.nbytes / 1e6:.1f} MB",
    ]


def _arithmetic(linear: LinearSpec) -> str:
    groups = f" in groups of {linear.group}" if linear.group else ""
    return f"{_WEIGHTS[linear.kind]}{groups}, activations in {_ACTIVATIONS[linear.kind]}"


def _read_layers(
    library: Library, checkpoint: Checkpoint, arch: Architecture, group_size: int | None, arena: native.Arena
) -> tuple[NativeLayer, ...]:
    # layers with one rope share one tensor, by which C++ knows that they share their angles
    frequencies = {id(rope): rope.inv_freq.to(torch.float32).contiguous() for rope in arch.ropes}
    layers = []
    for index, rope in enumerate(arch.ropes):
        reader = LayerReader(checkpoint, arch, index, group_size)
        linears = {kind: _read_linear(library, reader, kind, arena) for kind in JOINED}
        gains = {slot: gain for slot, gain in reader.gains().items() if gain is not None}
        layers.append(NativeLayer(linears, gains, frequencies[id(rope)]))
    return tuple(layers)


def _read_linear(library: Library, reader: LayerReader, kind: str, arena: native.Arena) -> native.NativeLinear:
    if reader.group_size is None:
        return native.dense(reader.dense(kind))
    return native.from_awq(library, reader.packed(kind), arena)


def _model_spec(
    arch: Architecture,
    layers: Sequence[NativeLayer],
    embedding: Tensor,
    norm: Tensor,
    head: LinearSpec,
    exact_head: Tensor,
) -> ModelSpec:
    """exact_head: the head in bf16, from which C++ recomputes the largest logits of an int4 head."""
    specs = (LayerSpec * len(layers))(*(_layer_spec(arch, index, layer) for index, layer in enumerate(layers)))
    return ModelSpec(
        hidden=arch.hidden, layers=len(layers), eps=arch.eps,
        embed_scale=float(embed_scale(arch, torch.bfloat16)),
        attention_softcap=arch.attention_softcap or 0.0, final_softcap=arch.final_softcap or 0.0,
        embedding=embedding.data_ptr(), norm=norm.data_ptr(), head=head, layer=specs,
        exact=exact_head.data_ptr() if head.kind == INT4 else None,
    )  # fmt: skip


def _layer_spec(arch: Architecture, index: int, layer: NativeLayer) -> LayerSpec:
    layout, rope = arch.layouts[index], arch.ropes[index]
    if layer.inv_freq.numel() != layout.head_dim // 2:
        raise AssertionError(f"layer {index} has {layer.inv_freq.numel()} frequencies for heads of {layout.head_dim}")
    return LayerSpec(
        heads=layout.heads, kv_heads=layout.kv_heads, head_dim=layout.head_dim, intermediate=layout.intermediate,
        window=layout.window or 0, inv_freq=layer.inv_freq.data_ptr(), rope_factor=rope.factor,
        query_scale=arch.query_scale,
        **{kind: linear.spec for kind, linear in layer.linears.items()},
        **{slot: gain.data_ptr() for slot, gain in layer.gains.items()},
    )  # fmt: skip


def _arena_bytes(arch: Architecture, group_size: int | None, head_kind: int, head_group_size: int | None) -> int:
    """How many bytes all integer weights take together."""
    total = 0
    if group_size is not None:
        for layout in arch.layouts:
            for names in joined_linears(layout).values():
                linear = layout.joined(names)
                total += native.arena_bytes(INT4, linear.inputs, linear.outputs, group_size)
    if head_group_size is not None:
        total += native.arena_bytes(head_kind, arch.hidden, arch.vocabulary, head_group_size)
    return total
