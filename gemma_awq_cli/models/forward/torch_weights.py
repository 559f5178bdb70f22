"""The torch decoder's weights from a checkpoint: packed kernels or 16-bit linears, on any device."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemma_awq_cli.kernels.head import make_head
from gemma_awq_cli.kernels.packed_linear import make_linear
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward.decoder_weights import (
    JOINED,
    LayerReader,
    embed_scale,
    read_embedding,
    read_final_gain,
)
from gemma_awq_cli.models.forward.torch_decoder import LayerWeights, TextWeights
from gemma_awq_cli.models.gemma.architecture import Architecture


class JoinedLinear(nn.Module):
    """16-bit weights that share an input, their outputs side by side; each stays mapped from its file."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        parts = [F.linear(x, weight) for weight in self.weights]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def read_torch_text(
    checkpoint: Checkpoint,
    arch: Architecture,
    group_size: int | None,
    device: torch.device,
    dtype: torch.dtype,
    head: str = "16bit",
) -> TextWeights:
    """Read all weights of the language model. group_size: None for a 16-bit checkpoint; head: see `kernels.head`."""
    layers = []
    for index in range(len(arch.layouts)):
        reader = LayerReader(checkpoint, arch, index, group_size)
        linears = {kind: _linear(reader, kind, device, dtype) for kind in JOINED}
        gains = {name: None if gain is None else gain.to(device) for name, gain in reader.gains().items()}
        layers.append(LayerWeights(**linears, **gains))  # type: ignore[arg-type]
    embedding, weight = read_embedding(checkpoint)
    embedding = embedding.to(device, dtype)
    weight = embedding if checkpoint.tied_head else weight.to(device, dtype)
    norm = read_final_gain(checkpoint, arch).to(device)
    scale = embed_scale(arch, dtype).to(device)
    return TextWeights(arch, embedding, scale, tuple(layers), norm, make_head(weight, head), dtype)


def _linear(reader: LayerReader, kind: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    if reader.group_size is not None:
        return make_linear(reader.packed(kind), device, dtype)
    return JoinedLinear([weight.to(device, dtype) for weight in reader.dense(kind)])
