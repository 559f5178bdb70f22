"""A checkpoint's language model as the torch and the compiled decoder want it: joined linears and the norms' gains."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_awq_cli.awq.packing import PackedWeight
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.expected_tensors import EMBEDDING, FINAL_NORM, HEAD
from gemma_awq_cli.models.checkpoints.packed_linears import read_packed
from gemma_awq_cli.models.gemma.architecture import Architecture
from gemma_awq_cli.models.gemma.layers import LayerLayout

JOINED = ("qkv", "o", "gate_up", "down")  # the groups of linears with one input, by their names in a layout
GAINS = ("input_norm", "attention_norm", "mlp_norm", "post_mlp_norm", "q_norm", "k_norm")


@dataclass(frozen=True)
class LayerReader:
    """Reads the tensors of layer `index`. group_size: None for a 16-bit checkpoint."""

    checkpoint: Checkpoint
    arch: Architecture
    index: int
    group_size: int | None

    @property
    def layout(self) -> LayerLayout:
        return self.arch.layouts[self.index]

    @property
    def _prefix(self) -> str:
        return f"model.layers.{self.index}."

    def packed(self, joined: str) -> PackedWeight:
        """The linears of one of `JOINED` as one, their outputs side by side: of artifacts only."""
        assert self.group_size is not None
        parts = []
        for name in joined_linears(self.layout)[joined]:
            linear = self.layout.linears[name]
            parts.append(
                read_packed(self.checkpoint, self._prefix + name, linear.inputs, linear.outputs, self.group_size)
            )
        if len(parts) == 1:
            return parts[0]
        return PackedWeight(*(torch.cat(tensors, 1) for tensors in zip(*parts, strict=True)))

    def dense(self, joined: str) -> list[Tensor]:
        """The weights [N, K] of one of `JOINED`, mapped from the file: of 16-bit checkpoints only."""
        names = [f"{self._prefix}{name}.weight" for name in joined_linears(self.layout)[joined]]
        read = self.checkpoint.read(names)
        return [read[name] for name in names]

    def gains(self) -> dict[str, Tensor | None]:
        """The gains [N] float32 of the norms in `GAINS`; None for those that the layer does not have."""
        names = {slot: f"{self._prefix}{norm.name}.weight" for slot, norm in self.layout.norms.items()}
        read = self.checkpoint.read(names.values())
        gains: dict[str, Tensor | None] = dict.fromkeys(GAINS)
        return gains | {slot: _gain(read[name], self.arch) for slot, name in names.items()}


def joined_linears(layout: LayerLayout) -> dict[str, tuple[str, ...]]:
    """The linears of each of `JOINED`, in the order of their outputs."""
    groups = {group.name: group.linears for group in layout.groups}
    return {name: groups[name] for name in JOINED}


def read_embedding(checkpoint: Checkpoint) -> tuple[Tensor, Tensor]:
    """The embedding and the head [V, hidden]; they are the same tensor if the checkpoint ties them."""
    read = checkpoint.read([EMBEDDING] if checkpoint.tied_head else [EMBEDDING, HEAD])
    return read[EMBEDDING], read.get(HEAD, read[EMBEDDING])


def read_final_gain(checkpoint: Checkpoint, arch: Architecture) -> Tensor:
    """The gain [hidden] float32 of the last norm."""
    return _gain(checkpoint.read([FINAL_NORM])[FINAL_NORM], arch)


def embed_scale(arch: Architecture, dtype: torch.dtype) -> Tensor:
    """What the embedding's rows are multiplied by: rounded to the activations' dtype, as transformers does it."""
    return torch.tensor(arch.embed_scale, dtype=dtype)


def _gain(weight: Tensor, arch: Architecture) -> Tensor:
    """What an RMSNorm with this stored weight multiplies by."""
    return arch.gain_offset + weight.to(torch.float32)
