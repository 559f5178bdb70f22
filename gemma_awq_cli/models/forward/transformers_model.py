"""transformers' own causal model of a checkpoint's language model, with an artifact's linears left packed."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.kernels.packed_linear import MakeLinear, make_linear
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward.decoder_weights import EXPERT_JOINED, LayerReader
from gemma_awq_cli.models.forward.experts import mix_experts
from gemma_awq_cli.models.forward.layerwise import meta_model, parameter_shapes
from gemma_awq_cli.models.forward.torch_weights import expert_linears
from gemma_awq_cli.models.gemma.architecture import TextShape, architecture_of
from gemma_awq_cli.models.gemma.layers import Linear


@torch.no_grad()  # not inference_mode: what is trained on top of the model goes through its tensors
def build_model(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, make: MakeLinear = make_linear
) -> Any:
    """The model on `device`, with every parameter and buffer loaded and nothing trainable.

    make: makes what stands for each packed linear.
    """
    model = meta_model(checkpoint.text_config)
    if checkpoint.quantization is not None:
        _replace_linears(model, checkpoint, device, dtype, make)
    shapes = parameter_shapes(model, checkpoint.tied_head)
    weights = {name: tensor.to(device, dtype) for name, tensor in checkpoint.read(shapes).items()}
    model.load_state_dict(weights, strict=False, assign=True)
    return finish_model(model, checkpoint, device)


def finish_model(model: Any, checkpoint: Checkpoint, device: torch.device) -> Any:
    """Complete a model whose stored tensors are loaded: tie the head, compute what is not stored, freeze it all.

    device: of the embedding and of the buffers that are computed.
    """
    if checkpoint.tied_head:
        model.lm_head.weight = model.model.embed_tokens.weight
    _compute_buffers(model, checkpoint.shape, device)
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if left:
        raise AssertionError(f"never loaded: {left[:3]}")
    return model.requires_grad_(False)


def layer_linears(checkpoint: Checkpoint) -> dict[str, Linear]:
    """The linears that an artifact packs, without the experts', by name (`model.layers.0.self_attn.q_proj`)."""
    return {
        f"model.layers.{index}.{name}": linear
        for index, layout in enumerate(checkpoint.shape.layouts)
        for name, linear in layout.linears.items()
    }


def _compute_buffers(model: Any, shape: TextShape, device: torch.device) -> None:
    """Compute the rotary tables and the scales that follow from the config and are not stored."""
    text = model.model
    with torch.device(device):
        text.rotary_emb = type(text.rotary_emb)(text.config)
    for embedding in [text.embed_tokens, *([text.embed_tokens_per_layer] if shape.per_layer else [])]:
        embedding.embed_scale = torch.tensor(embedding.scalar_embed_scale, device=device)
    if shape.altup is not None:
        text.per_layer_projection_scale = torch.tensor(shape.hidden**-0.5, device=device)
        text.per_layer_input_scale = torch.rsqrt(torch.tensor(2.0, device=device))
        for layer in text.layers:
            layer.altup.router_input_scale = torch.tensor(shape.hidden**-1.0, device=device)


def _replace_linears(
    model: nn.Module, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, make: MakeLinear
) -> None:
    """Put packed linears in place of the layers' own."""
    arch = architecture_of(checkpoint.facts, checkpoint.family)
    for index, layout in enumerate(arch.layouts):
        prefix, packed = f"model.layers.{index}.", checkpoint.packed(index)
        linears = {prefix + name: one for name, one in packed.items() if name in layout.linears}
        for name, weight in (checkpoint.read_packed(linears) if linears else {}).items():
            if linears[name].bias:
                raise GemmaAwqError(
                    f"{name} of {checkpoint.folder} has a bias, which packed linears cannot hold.",
                    "Use the 16-bit model instead.",
                )
            model.set_submodule(name, make(weight, device, dtype))
        reader = LayerReader(checkpoint, arch, index)
        if reader.packs_experts:
            experts = (expert_linears(reader, kind, device, dtype, make) for kind in EXPERT_JOINED)
            model.set_submodule(f"{prefix}experts", PackedExperts(*experts))


class PackedExperts(nn.Module):
    """In place of transformers' experts of one layer: a packed linear each, so that they are never expanded as a whole.

    gate_up, down: a linear per expert.
    """

    def __init__(self, gate_up: Sequence[nn.Module], down: Sequence[nn.Module]) -> None:
        super().__init__()
        self.gate_up, self.down = nn.ModuleList(gate_up), nn.ModuleList(down)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return mix_experts(x, chosen, weights, list(self.gate_up), list(self.down))
