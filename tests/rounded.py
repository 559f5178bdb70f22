"""An artifact of any tiny checkpoint, rounded to nearest: what the forwards need to be tested on packed weights."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from gemma_awq_cli.awq.grid import minmax_grid, quantize
from gemma_awq_cli.awq.packing import pack_weight
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.side_files import copy_side_files, side_files
from gemma_awq_cli.models.checkpoints.weight_files import read_tensors
from gemma_awq_cli.models.gemma.layers import DOWN, GATE_UP


def make_rounded(checkpoint_folder: Path, folder: Path, group_size: int = 32) -> Path:
    """Write the artifact: linears packed, the experts' one by one, everything else as it is."""
    checkpoint = Checkpoint(checkpoint_folder)
    tensors = {name: tensor.clone() for name, tensor in read_tensors(checkpoint.tensors, checkpoint.tensors).items()}
    for index, layout in enumerate(checkpoint.shape.layouts):
        prefix = f"model.layers.{index}."
        for name in layout.unpacked():
            weight = tensors.pop(checkpoint.key(prefix + name))
            for linear, part in _linears(name, weight).items():
                base = checkpoint.key(f"{prefix}{linear}.weight").removesuffix(".weight")
                tensors |= {f"{base}.{kind}": one for kind, one in _packed(part, group_size).items()}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    copy_side_files(side_files(checkpoint_folder), folder)
    section = {
        "quant_method": "awq", "version": "gemm", "bits": 4, "group_size": group_size, "zero_point": True,
        "modules_to_not_convert": list(checkpoint.family.not_converted),
    }  # fmt: skip
    config = {**checkpoint.raw_config, "quantization_config": section}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def _linears(name: str, weight: Tensor) -> dict[str, Tensor]:
    """The linears in one 16-bit tensor, by their names in the layer."""
    if name == GATE_UP:
        parts = {"gate_proj": weight.chunk(2, 1)[0], "up_proj": weight.chunk(2, 1)[1]}
        return {f"experts.{e}.{part}": stacked[e] for part, stacked in parts.items() for e in range(len(weight))}
    if name == DOWN:
        return {f"experts.{e}.down_proj": one for e, one in enumerate(weight)}
    return {name.removesuffix(".weight"): weight}


def _packed(weight: Tensor, group_size: int) -> dict[str, Tensor]:
    grid = minmax_grid(weight.float(), group_size)
    packed = pack_weight(quantize(weight.float(), grid).to(torch.uint8), grid)
    return {kind: tensor.contiguous() for kind, tensor in packed._asdict().items()}
