"""transformers' own causal model of a checkpoint's language model, with an artifact's linears left packed."""

from typing import Any

import torch
from torch import Tensor, nn

from gemma_awq_cli.awq.grid import dequantize
from gemma_awq_cli.awq.packing import unpack_weight
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.kernels.packed_linear import make_linear
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.packed_linears import read_packed, read_packed_linears, require_awq
from gemma_awq_cli.models.forward.layerwise import meta_model, parameter_shapes
from gemma_awq_cli.models.forward.memory import require_memory
from gemma_awq_cli.models.gemma.layers import Linear

NOT_PACKED = "Close other programs, or use another --device or machine."


@torch.inference_mode()
def build_model(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Any:
    """The model on `device`, with every parameter and buffer loaded and nothing trainable."""
    model = meta_model(checkpoint.text_config)
    experts: dict[str, Tensor] = {}
    if checkpoint.quantization is not None:
        _replace_linears(model, checkpoint, device, dtype)
        experts = _dense_experts(checkpoint, device, dtype)
    names = [name for name in parameter_shapes(model, checkpoint.tied_head) if name not in experts]
    weights = {name: tensor.to(device, dtype) for name, tensor in checkpoint.read(names).items()}
    model.load_state_dict(weights | experts, strict=False, assign=True)
    return finish_model(model, checkpoint, device)


def finish_model(model: Any, checkpoint: Checkpoint, device: torch.device) -> Any:
    """Complete a model whose stored tensors are loaded: tie the head, compute what is not stored, freeze it all.

    device: of the embedding and of the buffers that are computed.
    """
    if checkpoint.tied_head:
        model.lm_head.weight = model.model.embed_tokens.weight
    _compute_buffers(model, device)
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if left:
        raise AssertionError(f"never loaded: {left[:3]}")
    return model.requires_grad_(False)


def layer_linears(checkpoint: Checkpoint) -> dict[str, Linear]:
    """Every linear of the layers outside experts, by its name in transformers (`model.layers.0.self_attn.q_proj`)."""
    return {
        f"model.layers.{index}.{name}": linear
        for index, layout in enumerate(checkpoint.shape.layouts)
        for name, linear in layout.linears.items()
    }


def _dense_experts(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """The experts of an artifact as transformers' modules hold them, not packed but stacked, by their full names."""
    stacks = {
        f"model.layers.{index}.{name}": shape
        for index, layout in enumerate(checkpoint.shape.layouts)
        if layout.experts is not None
        for name, shape in layout.experts.stacked().items()
    }
    if not stacks:
        return {}
    needed = sum(torch.Size(shape).numel() for shape in stacks.values()) * dtype.itemsize
    require_memory(
        needed, device, f"{checkpoint.folder.name} in transformers, with its experts in 16 bits,", NOT_PACKED
    )
    made = {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in stacks.items()}
    group_size = require_awq(checkpoint)
    for index, layout in enumerate(checkpoint.shape.layouts):
        prefix = f"model.layers.{index}."
        experts = {name: linear for name, linear in layout.packed().items() if name not in layout.linears}
        packed = read_packed_linears(checkpoint, {prefix + name: one for name, one in experts.items()}, group_size)
        places = layout.places()
        for name in experts:
            made[prefix + places[name].tensor][places[name].part] = dequantize(*unpack_weight(packed[prefix + name]))
    return made


def _compute_buffers(model: Any, device: torch.device) -> None:
    """Compute the rotary tables and the embedding's scale, which follow from the config and are not stored."""
    text = model.model
    with torch.device(device):
        text.rotary_emb = type(text.rotary_emb)(text.config)
    text.embed_tokens.embed_scale = torch.tensor(text.embed_tokens.scalar_embed_scale, device=device)


def _replace_linears(model: nn.Module, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
    """Put packed linears in place of the layers' own."""
    group_size = require_awq(checkpoint)
    for name, linear in layer_linears(checkpoint).items():
        if linear.bias:
            raise GemmaAwqError(
                f"{name} of {checkpoint.folder} has a bias, which packed linears cannot hold.",
                "Use the 16-bit model instead.",
            )
        packed = read_packed(checkpoint, name, linear.inputs, linear.outputs, group_size)
        model.set_submodule(name, make_linear(packed, device, dtype))
