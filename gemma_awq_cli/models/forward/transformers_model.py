"""transformers' own causal model of a checkpoint's text side, with an artifact's linears left packed."""

from typing import Any

import torch
from torch import nn

from gemma_awq_cli.kernels import make_linear
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.packed_linears import read_packed, require_awq
from gemma_awq_cli.models.forward.layerwise import meta_model, parameter_shapes
from gemma_awq_cli.models.forward.loading_dense import make_buffers_real


@torch.inference_mode()
def build_model(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Any:
    """The model on `device`, every parameter and buffer real, nothing trainable."""
    model = meta_model(checkpoint.text_config)
    if checkpoint.quantization is not None:
        _replace_linears(model, checkpoint, device, dtype)
    shapes = parameter_shapes(model, checkpoint.tied_head)
    weights = {name: tensor.to(device, dtype) for name, tensor in checkpoint.read(shapes).items()}
    model.load_state_dict(weights, strict=False, assign=True)
    if checkpoint.tied_head:
        model.lm_head.weight = model.model.embed_tokens.weight
    make_buffers_real(model, device)
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if left:
        raise AssertionError(f"never made real: {left[:3]}")
    model.requires_grad_(False)
    return model


def _replace_linears(model: nn.Module, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
    """Put packed linears where the artifact has them."""
    group_size = require_awq(checkpoint)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.startswith("model.layers."):
            packed = read_packed(checkpoint, name, module.in_features, module.out_features, group_size)
            model.set_submodule(name, make_linear(packed, device, dtype))
