"""A checkpoint's language model as the decode paths want it: joined linears and norm gains, layer by layer.

The torch decoder and the compiled one both read through `LayerReader`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_awq_cli.awq.packing import PackedWeight
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.expected_tensors import EMBEDDING, FINAL_NORM, HEAD, linear_shapes, norm_names
from gemma_awq_cli.models.checkpoints.packed_linears import read_packed
from gemma_awq_cli.models.gemma.architecture import Architecture

JOINED = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


@dataclass(frozen=True)
class LayerReader:
    """Reads one layer's tensors. group_size: None for a 16-bit checkpoint."""

    checkpoint: Checkpoint
    arch: Architecture
    index: int
    group_size: int | None

    def packed(self, kind: str) -> PackedWeight:
        """The linears of a kind of `JOINED` as one, their outputs side by side: only artifacts."""
        assert self.group_size is not None
        parts = []
        for name in JOINED[kind]:
            outputs, inputs = linear_shapes(self.arch)[name]
            full = f"model.layers.{self.index}.{name}"
            parts.append(read_packed(self.checkpoint, full, inputs, outputs, self.group_size))
        if len(parts) == 1:
            return parts[0]
        return PackedWeight(*(torch.cat(tensors, 1) for tensors in zip(*parts, strict=True)))

    def dense(self, kind: str) -> list[Tensor]:
        """The weights [N, K] of a kind of `JOINED`, where they lie in the file: only 16-bit checkpoints."""
        names = [f"model.layers.{self.index}.{name}.weight" for name in JOINED[kind]]
        read = self.checkpoint.read(names)
        return [read[name] for name in names]

    def gains(self) -> dict[str, Tensor | None]:
        """The gains [N] float32 of the norms, by the decode paths' names; None where the family has none."""
        names = norm_names(self.arch)
        read = self.checkpoint.read(f"model.layers.{self.index}.{name}.weight" for name in names.values())
        gains: dict[str, Tensor | None] = dict.fromkeys(("attention_norm", "post_mlp_norm", "q_norm", "k_norm"))
        for kind, name in names.items():
            gains[kind] = self.arch.gain_offset + read[f"model.layers.{self.index}.{name}.weight"].to(torch.float32)
        return gains


def read_embedding(checkpoint: Checkpoint) -> tuple[Tensor, Tensor]:
    """The embedding and the head [V, hidden], the same tensor where they are tied."""
    read = checkpoint.read([EMBEDDING] if checkpoint.tied_head else [EMBEDDING, HEAD])
    return read[EMBEDDING], read.get(HEAD, read[EMBEDDING])


def read_final_gain(checkpoint: Checkpoint, arch: Architecture) -> Tensor:
    """The gain [hidden] float32 of the last norm."""
    return arch.gain_offset + checkpoint.read([FINAL_NORM])[FINAL_NORM].to(torch.float32)
