"""`--to mlx`: the affine 4-bit weights of Apple's MLX, under the names that mlx-lm gives its modules.

MLX computes `w = scale * q + bias` with q in 0..15, so bias = -zero * scale. In float32 both are exact: a scale has at
most 11 significant bits and a zero point four. Source of the layout: mlx 0.32, `nn/layers/quantized.py`; of names and
configs: mlx-lm 0.32, `utils.py` and `models/gemma*.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gemma_awq_cli.awq.packing import PackedWeight
from gemma_awq_cli.awq.repacking import repack_rows, unpack_in_order
from gemma_awq_cli.export.conversion import Conversion, Format
from gemma_awq_cli.export.mlx_config import mlx_config, mlx_refusal
from gemma_awq_cli.export.safetensors_conversion import (
    SafetensorsConversion,
    Stack,
    TensorLayout,
    experts_stacked,
    renamed,
)
from gemma_awq_cli.export.source_facts import group_size_of, stored_dtype
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.writing import PlannedTensor
from gemma_awq_cli.models.gemma.layers import Linear

# What rounding scale and bias costs, in units of the scale: half a unit in the last place of each, and q and the zero
# point are at most 15.
_BOUNDS = {"float32": 0.0, "float16": 2 * 15 * 2.0**-11, "bfloat16": 2 * 15 * 2.0**-8}
# What mlx-lm's modules begin with, where its names differ from transformers' causal model.
_PREFIXES = {
    "gemma3": ("language_model.model.", "language_model.lm_head"),
    "gemma3n": ("model.language_model.", "lm_head"),
    "gemma4": ("language_model.model.", "language_model.lm_head"),
    "gemma4_unified": ("language_model.model.", "language_model.lm_head"),
}


def convert(checkpoint: Checkpoint, _: str, options: Mapping[str, Any]) -> Conversion:
    """Start a conversion of the language model. Embedding and head keep their dtype; towers are left out."""
    scales, key = str(options["scales"]), _key(checkpoint)
    rounded = "" if scales == "float32" else f" Scales and biases are rounded to {scales}."
    layout = TensorLayout(
        form=f"MLX, affine 4-bit with {scales} scales",
        key=key,
        stacks=_stacks,
        pack=_packer(getattr(torch, scales)),
        weight=_weight,
        bound=_BOUNDS[scales],
        tolerance=rounded.strip() or "None: scales and biases are exact in float32.",
        config=mlx_config(checkpoint, stored_dtype(checkpoint), group_size_of(checkpoint)),
        companions=False,
        zeros=_unused(checkpoint, key, getattr(torch, scales)),
        notes=["mlx-lm runs the language model alone: towers and embedders are left out."]
        if checkpoint.companions()
        else [],
    )
    return SafetensorsConversion(checkpoint, layout)


def _key(checkpoint: Checkpoint) -> Callable[[str], str]:
    prefix, head = _PREFIXES.get(checkpoint.family.model_type, ("model.", "lm_head"))
    return lambda name: renamed(name, prefix, head)


def _stacks(linears: Sequence[str]) -> list[Stack]:
    parts = ("gate_proj", "up_proj", "down_proj")
    return experts_stacked(linears, {f"experts.switch_glu.{part}.{{kind}}": (part,) for part in parts})


def _packer(dtype: torch.dtype) -> Callable[[PackedWeight], dict[str, Tensor]]:
    def pack(packed: PackedWeight) -> dict[str, Tensor]:
        rows = repack_rows(packed)
        scale = rows.scale.float()
        return {
            "weight": rows.q.view(torch.uint32),
            "scales": scale.to(dtype),
            "biases": (-rows.zero.float() * scale).to(dtype),
        }

    return pack


def _weight(stored: Mapping[str, Tensor]) -> Tensor:
    scales, biases = stored["scales"].float(), stored["biases"].float()
    q = unpack_in_order(stored["weight"].view(torch.int32)).unflatten(1, (scales.shape[1], -1)).float()
    return (q * scales[:, :, None] + biases[:, :, None]).flatten(1)


def _unused(checkpoint: Checkpoint, key: Callable[[str], str], dtype: torch.dtype) -> list[PlannedTensor]:
    """Keys and values of Gemma 3n's layers that read another layer's: mlx-lm insists on them and does not use them."""
    if checkpoint.family.text_type != "gemma3n_text":
        return []
    planned: list[PlannedTensor] = []
    group_size = group_size_of(checkpoint)
    for index, layout in enumerate(checkpoint.shape.layouts):
        if layout.kv_source is None:
            continue
        prefix = f"model.layers.{index}.self_attn."
        linear = Linear(layout.kv_heads * layout.head_dim, layout.hidden)
        for name in ("k_proj", "v_proj"):
            groups = (linear.outputs, linear.inputs // group_size)
            base = key(f"{prefix}{name}")
            planned += [
                PlannedTensor(f"{base}.weight", torch.uint32, (linear.outputs, linear.inputs // 8)),
                PlannedTensor(f"{base}.scales", dtype, groups),
                PlannedTensor(f"{base}.biases", dtype, groups),
            ]
        norm = checkpoint.tensors[checkpoint.key("model.norm.weight")].dtype
        planned.append(PlannedTensor(key(f"{prefix}k_norm.weight"), norm, (layout.head_dim,)))
    return planned


MLX_FORMAT = Format("mlx", mlx_refusal, convert)
