"""A checkpoint's language model as the torch and the compiled decoder want it: joined linears and the norms' gains.

All of it is numpy's: an artifact runs without torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gemma_awq_cli.awq.packed_arrays import PackedArrays, side_by_side
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.expected_tensors import EMBEDDING, FINAL_NORM, HEAD
from gemma_awq_cli.models.gemma.architecture import (
    PER_LAYER_NORM,
    PER_LAYER_PROJECTION,
    PER_LAYER_TABLE,
    Architecture,
)
from gemma_awq_cli.models.gemma.layers import DOWN, GATE_UP, LayerLayout
from gemma_awq_cli.system.arrays import BFLOAT16, Array

JOINED = ("qkv", "o", "gate_up", "down")  # the groups of linears with one input, by their names in a layout
EXPERT_JOINED = {"gate_up": GATE_UP, "down": DOWN}  # the same of each expert -> the 16-bit tensor that stacks them
GAINS = (
    "input_norm", "attention_norm", "mlp_norm", "post_mlp_norm", "q_norm", "k_norm", "per_layer_norm", "laurel_norm",
    "router_norm", "dense_norm", "experts_norm", "post_experts_norm",
)  # fmt: skip


@dataclass(frozen=True)
class LayerReader:
    """Reads the tensors of layer `index`."""

    checkpoint: Checkpoint
    arch: Architecture
    index: int

    @property
    def layout(self) -> LayerLayout:
        return self.arch.layouts[self.index]

    @property
    def _prefix(self) -> str:
        return f"model.layers.{self.index}."

    @cached_property
    def _packed(self) -> dict[str, PackedArrays]:
        """All packed linears by their names in the layer: opening a file for each expert would take minutes."""
        linears = self.checkpoint.packed(self.index)
        if not linears:
            return {}
        read = self.checkpoint.packed_arrays({self._prefix + name: linear for name, linear in linears.items()})
        return {name.removeprefix(self._prefix): packed for name, packed in read.items()}

    def parts(self, joined: str) -> list[PackedArrays | Array]:
        """The linears of one of `JOINED` in the order of their outputs.

        If all are packed, they are one part, side by side. 16-bit weights [N, K] are mapped from the file.
        """
        names = joined_linears(self.layout)[joined]
        if all(name in self._packed for name in names):
            return [self._side_by_side(names)]
        dense = [name for name in names if name not in self._packed]
        read = self.checkpoint.arrays(f"{self._prefix}{name}.weight" for name in dense)
        return [self._packed[name] if name in self._packed else read[f"{self._prefix}{name}.weight"] for name in names]

    @property
    def packs_experts(self) -> bool:
        """Whether the experts are packed: all are, or none."""
        experts = self.layout.experts
        return experts is not None and any(name in self._packed for name in experts.linears(0))

    def packed_expert(self, expert: int, joined: str) -> PackedArrays:
        """The linears of one of `EXPERT_JOINED` of one expert as one, if experts are packed."""
        experts = self.layout.experts
        assert experts is not None
        group = experts.gate_up if joined == "gate_up" else experts.down
        return self._side_by_side([f"experts.{expert}.{name}" for name in group.linears])

    def _side_by_side(self, names: Sequence[str]) -> PackedArrays:
        return side_by_side([self._packed[name] for name in names])

    def dense_experts(self, joined: str) -> Array:
        """The weights [experts, N, K] of one of `EXPERT_JOINED`, mapped from the file, if experts have 16 bits."""
        name = self._prefix + EXPERT_JOINED[joined]
        return self.checkpoint.arrays([name])[name]

    def kept(self) -> dict[str, Array]:
        """The tensors in the layout's `kept`, as stored and mapped from the file, by their names there."""
        read = self.checkpoint.arrays(self._prefix + name for name in self.layout.kept)
        return {name: read[self._prefix + name] for name in self.layout.kept}

    def gains(self) -> dict[str, Array | None]:
        """The gains [N] float32 of the norms in `GAINS`; None for those that the layer does not have."""
        names = {slot: f"{self._prefix}{norm.name}.weight" for slot, norm in self.layout.norms.items()}
        read = self.checkpoint.arrays(names.values())
        gains: dict[str, Array | None] = dict.fromkeys(GAINS)
        return gains | {slot: _gain(read[name], self.arch) for slot, name in names.items()}


def joined_linears(layout: LayerLayout) -> dict[str, tuple[str, ...]]:
    """The linears of each of `JOINED`, in the order of their outputs."""
    groups = {group.name: group.linears for group in layout.groups}
    return {name: groups[name] for name in JOINED}


def read_embedding(checkpoint: Checkpoint) -> tuple[Array, Array]:
    """The embedding and the head [V, hidden]; they are the same tensor if the checkpoint ties them."""
    read = checkpoint.arrays([EMBEDDING] if checkpoint.tied_head else [EMBEDDING, HEAD])
    return read[EMBEDDING], read.get(HEAD, read[EMBEDDING])


def read_final_gain(checkpoint: Checkpoint, arch: Architecture) -> Array:
    """The gain [hidden] float32 of the last norm."""
    return _gain(checkpoint.arrays([FINAL_NORM])[FINAL_NORM], arch)


@dataclass(frozen=True)
class PerLayerTensors:
    """The tensors of the per-layer inputs outside the layers.

    table: [vocabulary, layers * width], mapped from the file: its rows are read when their tokens come; projection:
    [layers * width, hidden], mapped too; gain: [width] float32.
    """

    table: Array
    projection: Array
    gain: Array


def read_per_layer(checkpoint: Checkpoint, arch: Architecture) -> PerLayerTensors | None:
    """The tensors of the per-layer inputs; None for a model without them."""
    if arch.per_layer is None:
        return None
    read = checkpoint.arrays([PER_LAYER_PROJECTION, PER_LAYER_NORM])
    table = checkpoint.mapped(PER_LAYER_TABLE)
    return PerLayerTensors(table, read[PER_LAYER_PROJECTION], _gain(read[PER_LAYER_NORM], arch))


@dataclass(frozen=True)
class StreamTensors:
    """What makes AltUp's further streams of the embedding, and what makes one state of all of them: [hidden, hidden]
    each, mapped from the file.
    """

    starts: tuple[Array, ...]
    ends: tuple[Array, ...]


def read_streams(checkpoint: Checkpoint, arch: Architecture) -> StreamTensors | None:
    """The projections of AltUp's streams; None for a model without them."""
    if arch.altup is None:
        return None
    starts, ends = (
        [f"model.{name}.{index}.weight" for index in range(arch.altup.streams - 1)]
        for name in ("altup_projections", "altup_unembed_projections")
    )
    read = checkpoint.arrays([*starts, *ends])
    return StreamTensors(tuple(read[name] for name in starts), tuple(read[name] for name in ends))


def embed_scale(arch: Architecture) -> float:
    """What the embedding's rows are multiplied by with activations in bfloat16: rounded, as transformers does it."""
    return float(BFLOAT16.type(arch.embed_scale))


def _gain(weight: Array, arch: Architecture) -> Array:
    """What an RMSNorm with this stored weight multiplies by."""
    return np.float32(arch.gain_offset) + weight.astype(np.float32)
