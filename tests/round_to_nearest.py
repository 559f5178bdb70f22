"""Artifacts of tiny checkpoints, rounded to nearest, and transformers' model of what their integers stand for."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from gemma_awq_cli.awq.grid import dequantize, minmax_grid, quantize
from gemma_awq_cli.awq.packing import pack_weight, unpack_weight
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.weight_files import read_tensors
from gemma_awq_cli.models.forward.transformers_model import build_model
from gemma_awq_cli.models.gemma.layers import DOWN, GATE_UP, LayerLayout

GROUP = 32


def round_checkpoint(source: Path, folder: Path) -> Path:
    """An artifact of a 16-bit checkpoint, without any search."""
    checkpoint = Checkpoint(source)
    kept = set(checkpoint.text_tensors())
    packed: dict[str, Tensor] = {}
    for index, layout in enumerate(checkpoint.shape.layouts):
        prefix = f"model.layers.{index}."
        kept -= {checkpoint.key(prefix + name) for name in layout.unpacked()}
        stored = checkpoint.read(prefix + name for name in layout.unpacked())
        for name in layout.packed():
            weight = _weight({key.removeprefix(prefix): tensor for key, tensor in stored.items()}, layout, name).float()
            grid = minmax_grid(weight, GROUP)
            base = checkpoint.key(f"{prefix}{name}.weight").removesuffix(".weight")
            for kind, tensor in pack_weight(quantize(weight, grid).to(torch.uint8), grid)._asdict().items():
                packed[f"{base}.{kind}"] = tensor
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*", "config.json"))
    names = kept | set(checkpoint.companions())
    save_file({**read_tensors(checkpoint.tensors, names), **packed}, folder / "model.safetensors")
    section = {
        "quant_method": "awq", "version": "gemm", "bits": 4, "group_size": GROUP, "zero_point": True,
        "modules_to_not_convert": list(checkpoint.family.not_converted),
    }  # fmt: skip
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": section}), encoding="utf-8")
    return folder


def _weight(stored: dict[str, Tensor], layout: LayerLayout, name: str) -> Tensor:
    """The weight [N, K] of one linear that an artifact packs."""
    if layout.experts is None or not name.startswith("experts."):
        return stored[f"{name}.weight"]
    _, expert, kind = name.split(".")
    half = layout.experts.intermediate
    part = {"gate_proj": slice(half), "up_proj": slice(half, None), "down_proj": slice(None)}[kind]
    return stored[DOWN if kind == "down_proj" else GATE_UP][int(expert)][part]


def dense_twin(source: Path, artifact: Path) -> Any:
    """transformers' model of the 16-bit checkpoint in float32, with the weights that the artifact's integers stand for.

    source, artifact: the second was rounded from the first, without folds.
    """
    model = build_model(Checkpoint(source), torch.device("cpu"), torch.float32)
    checkpoint = Checkpoint(artifact)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for index, layout in enumerate(checkpoint.shape.layouts):
        prefix = f"model.layers.{index}."
        own = {name: weights[prefix + name] for name in layout.unpacked()}
        for name, linear in layout.packed().items():
            (packed,) = checkpoint.read_packed({prefix + name: linear}).values()
            _weight(own, layout, name).copy_(dequantize(*unpack_weight(packed)))
    model.load_state_dict(weights, assign=True)
    return model
