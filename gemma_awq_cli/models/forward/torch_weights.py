"""The torch decoder's weights from a checkpoint: packed kernels or 16-bit linears, on any device."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from gemma_awq_cli.awq.packed_arrays import PackedArrays
from gemma_awq_cli.awq.packing import PackedWeight, as_packed_weight
from gemma_awq_cli.kernels.dense_products import linear
from gemma_awq_cli.kernels.head import make_head
from gemma_awq_cli.kernels.packed_linear import MakeLinear, make_linear
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward.altup import AltUpWeights
from gemma_awq_cli.models.forward.decoder_weights import (
    JOINED,
    LayerReader,
    read_embedding,
    read_final_gain,
    read_per_layer,
    read_streams,
)
from gemma_awq_cli.models.forward.devices import CPU
from gemma_awq_cli.models.forward.experts import Experts, Router, StackedLinears
from gemma_awq_cli.models.forward.per_layer_embedding import PerLayerEmbedding, PerLayerGate
from gemma_awq_cli.models.forward.torch_layers import LayerWeights, StreamWeights, TextWeights
from gemma_awq_cli.models.gemma.architecture import Architecture
from gemma_awq_cli.system.arrays import as_tensor

_LAYER_GAINS = ("input_norm", "attention_norm", "mlp_norm", "post_mlp_norm", "q_norm", "k_norm")


class JoinedLinear(nn.Module):
    """Linears that share an input, their outputs side by side. parts: 16-bit weights, mapped, or packed linears."""

    def __init__(self, parts: Sequence[Tensor | nn.Module]) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, x: Tensor) -> Tensor:
        parts = [linear(x, part) if isinstance(part, Tensor) else part(x) for part in self.parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


@torch.inference_mode()
def read_torch_text(
    checkpoint: Checkpoint,
    arch: Architecture,
    device: torch.device,
    dtype: torch.dtype,
    head: str = "16bit",
) -> TextWeights:
    """Read all weights of the language model. head: see `kernels.head`."""
    readers = (LayerReader(checkpoint, arch, index) for index in range(arch.layers))
    embedding, weight = map(as_tensor, read_embedding(checkpoint))
    embedding = embedding.to(device, dtype)
    weight = embedding if checkpoint.tied_head else weight.to(device, dtype)
    return TextWeights(
        arch=arch,
        embedding=embedding,
        embed_scale=torch.tensor(arch.embed_scale, dtype=dtype, device=device),
        layers=tuple(_layer(reader, device, dtype) for reader in readers),
        norm=as_tensor(read_final_gain(checkpoint, arch)).to(device),
        head=make_head(weight, head),
        dtype=dtype,
        per_layer=_per_layer(checkpoint, arch, device, dtype),
        streams=_streams(checkpoint, arch, device, dtype),
    )


def _per_layer(
    checkpoint: Checkpoint, arch: Architecture, device: torch.device, dtype: torch.dtype
) -> PerLayerEmbedding | None:
    if (read := read_per_layer(checkpoint, arch)) is None:
        return None
    scale = torch.tensor(float(len(read.gain)) ** 0.5, dtype=dtype, device=device)  # rounded, as transformers does it
    projection, gain = as_tensor(read.projection).to(device, dtype), as_tensor(read.gain).to(device)
    return PerLayerEmbedding(as_tensor(read.table), scale, projection, gain, arch.eps)


def _streams(
    checkpoint: Checkpoint, arch: Architecture, device: torch.device, dtype: torch.dtype
) -> StreamWeights | None:
    if (read := read_streams(checkpoint, arch)) is None:
        return None
    starts, ends = (tuple(as_tensor(weight).to(device, dtype) for weight in part) for part in (read.starts, read.ends))
    return StreamWeights(starts, ends)


def _layer(reader: LayerReader, device: torch.device, dtype: torch.dtype) -> LayerWeights:
    gains = {slot: as_tensor(gain).to(device) for slot, gain in reader.gains().items() if gain is not None}
    kept = {name: as_tensor(array).to(device, dtype) for name, array in reader.kept().items()}
    linears = {kind: _linear(reader, kind, device, dtype) for kind in JOINED}
    return LayerWeights(
        **linears,  # type: ignore[arg-type]
        **{slot: gains.get(slot) for slot in _LAYER_GAINS},  # type: ignore[arg-type]
        scalar=kept.get("layer_scalar"),
        per_layer=_per_layer_gate(reader, gains, kept),
        altup=_altup(reader, gains, kept),
        experts=_experts(reader, gains, kept, device, dtype),
    )


def _linear(reader: LayerReader, kind: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    parts = [
        (
            make_linear(as_packed_weight(part), device, dtype)
            if isinstance(part, PackedArrays)
            else as_tensor(part).to(device, dtype)
        )
        for part in reader.parts(kind)
    ]
    dense = [part for part in parts if isinstance(part, Tensor)]
    if device.type != CPU and len(dense) == len(parts):
        parts = [torch.cat(dense)]  # one product; on the CPU they stay mapped from the file
    first = parts[0]
    return first if len(parts) == 1 and isinstance(first, nn.Module) else JoinedLinear(parts)


def _per_layer_gate(
    reader: LayerReader, gains: Mapping[str, Tensor], kept: Mapping[str, Tensor]
) -> PerLayerGate | None:
    if not reader.layout.per_layer_width:
        return None
    return PerLayerGate(
        gate=kept["per_layer_input_gate.weight"],
        projection=kept["per_layer_projection.weight"],
        norm=gains["per_layer_norm"],
        eps=reader.arch.eps,
    )


def _altup(reader: LayerReader, gains: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> AltUpWeights | None:
    if (altup := reader.arch.altup) is None:
        return None
    return AltUpWeights(
        predict=kept["altup.prediction_coefs.weight"],
        correct=kept["altup.correction_coefs.weight"],
        router=kept["altup.modality_router.weight"],
        router_norm=gains["router_norm"],
        output_scale=kept["altup.correct_output_scale"] if altup.scaled else None,
        left=kept["laurel.linear_left.weight"],
        right=kept["laurel.linear_right.weight"],
        laurel_norm=gains["laurel_norm"],
        active=altup.active,
        eps=reader.arch.eps,
    )


def _experts(
    reader: LayerReader,
    gains: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> Experts | None:
    if (layout := reader.layout.experts) is None:
        return None
    router = Router(
        weight=kept["router.proj.weight"],
        scale=kept["router.scale"],
        per_expert_scale=kept["router.per_expert_scale"],
        active=layout.active,
        eps=reader.arch.eps,
    )
    linears = expert_linears if device.type == CPU else stacked_linears
    return Experts(
        router=router,
        gate_up=linears(reader, "gate_up", device, dtype),
        down=linears(reader, "down", device, dtype),
        dense_norm=gains["dense_norm"],
        input_norm=gains["experts_norm"],
        output_norm=gains["post_experts_norm"],
        eps=reader.arch.eps,
    )


def expert_linears(
    reader: LayerReader, kind: str, device: torch.device, dtype: torch.dtype, make: MakeLinear = make_linear
) -> list[nn.Module]:
    """One of `EXPERT_JOINED` of each expert. make: makes what stands for each packed one."""
    assert reader.layout.experts is not None
    if not reader.packs_experts:
        return [JoinedLinear([weight]) for weight in as_tensor(reader.dense_experts(kind)).to(device, dtype)]
    count = reader.layout.experts.count
    return [make(as_packed_weight(reader.packed_expert(expert, kind)), device, dtype) for expert in range(count)]


def stacked_linears(reader: LayerReader, kind: str, device: torch.device, dtype: torch.dtype) -> StackedLinears:
    """The same, stacked: a device chooses among them itself."""
    assert reader.layout.experts is not None
    if not reader.packs_experts:
        return StackedLinears(as_tensor(reader.dense_experts(kind)).to(device, dtype))
    count = reader.layout.experts.count
    packed = [as_packed_weight(reader.packed_expert(expert, kind)) for expert in range(count)]
    return StackedLinears(PackedWeight(*(torch.stack(tensors).to(device) for tensors in zip(*packed, strict=True))))
