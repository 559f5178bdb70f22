"""Artifacts rewritten as other tools store them: by AutoAWQ's own code, or element by element as a layout is defined.

Nothing here uses the package's packing, so that a mistake there shows.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gemma_awq_cli.awq.packing import PackedWeight, unpack_weight

# integers [N, K], zero points [N, G], scales [N, G] float16 -> a linear's tensors by the ends of their names
Packer = Callable[[Tensor, Tensor, Tensor], Mapping[str, Tensor]]


def words(values: Tensor, dim: int) -> Tensor:
    """Integers 0..15 -> int32 along `dim`, eight to a word, the first in its lowest bits."""
    eights = np.moveaxis(values.numpy().astype(np.uint64), dim, -1)
    packed = np.zeros((*eights.shape[:-1], eights.shape[-1] // 8), np.uint64)
    for column in range(eights.shape[-1]):
        packed[..., column // 8] |= eights[..., column] << np.uint64(4 * (column % 8))
    return torch.from_numpy(np.moveaxis(packed.astype(np.uint32).view(np.int32), -1, dim).copy())


def autoawq(layout: str) -> Packer:
    """AutoAWQ's `from_linear`, which divides the dequantized weight by the scales again."""

    def pack(q: Tensor, zero: Tensor, scale: Tensor) -> Mapping[str, Tensor]:
        from awq.modules.linear.gemm import WQLinear_GEMM
        from awq.modules.linear.gemv import WQLinear_GEMV
        from awq.modules.linear.gemv_fast import WQLinear_GEMVFast
        from awq.modules.linear.marlin import WQLinear_Marlin

        group = q.shape[1] // scale.shape[1]
        wide_scale, wide_zero = (tensor.repeat_interleave(group, 1).float() for tensor in (scale, zero))
        linear = nn.Linear(q.shape[1], q.shape[0], bias=False)
        linear.weight.data = (q.float() - wide_zero) * wide_scale
        if layout == "gemm":
            made = WQLinear_GEMM.from_linear(
                linear, 4, group, scales=scale.t().contiguous(), zeros=zero.t().contiguous()
            )
        elif layout == "marlin":
            made = WQLinear_Marlin.from_linear(linear, 4, group, scales=scale)
        else:
            kind = {"gemv": WQLinear_GEMV, "gemv_fast": WQLinear_GEMVFast}[layout]
            made = kind.from_linear(linear, 4, group, scales=scale, zeros=zero)
        return {f".{name}": tensor for name, tensor in made.state_dict().items()}

    return pack


def gptq(version: int, symmetric: bool = False) -> Packer:
    """GPTQ's layout. Version 1 subtracts 1 from each word's zero points together, as GPTQModel does."""

    def pack(q: Tensor, zero: Tensor, scale: Tensor) -> Mapping[str, Tensor]:
        group = q.shape[1] // scale.shape[1]
        qzeros = words(zero.t(), 1)
        if version == 1:
            qzeros = torch.from_numpy((qzeros.numpy().view(np.uint32) - np.uint32(0x11111111)).view(np.int32))
        tensors = {
            ".qweight": words(q.t(), 0),
            ".scales": scale.t().contiguous(),
            ".g_idx": torch.arange(q.shape[1], dtype=torch.int32) // group,
        }
        return tensors if symmetric else {**tensors, ".qzeros": qzeros}

    return pack


def compressed_tensors(symmetric: bool, scales: torch.dtype = torch.bfloat16) -> Packer:
    """compressed-tensors' layout: signed integers, stored + 8."""

    def pack(q: Tensor, zero: Tensor, scale: Tensor) -> Mapping[str, Tensor]:
        tensors = {
            ".weight_packed": words(q, 1),
            ".weight_scale": scale.to(scales),
            ".weight_shape": torch.tensor(q.shape),
        }
        return tensors if symmetric else {**tensors, ".weight_zero_point": words(zero, 0)}

    return pack


def rewrite(
    artifact: Path, folder: Path, pack: Packer, section: dict[str, Any], keep: Callable[[str], bool] = lambda _: False
) -> Path:
    """Write an artifact with its linears in another layout. keep: which stay 16-bit, by name, in float32."""
    tensors = load_file(artifact / "model.safetensors")
    for name in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
        packed = PackedWeight(*(tensors.pop(f"{name}.{kind}") for kind in PackedWeight._fields))
        q, grid = unpack_weight(packed)
        if keep(name):
            group = q.shape[1] // grid.scale.shape[1]
            scale, zero = (tensor.repeat_interleave(group, 1) for tensor in grid)
            tensors[f"{name}.weight"] = (q.float() - zero) * scale
        else:
            made = pack(q, grid.zero.to(torch.int64), grid.scale.to(torch.float16))
            tensors |= {name + kind: tensor.contiguous() for kind, tensor in made.items()}
    folder.mkdir(parents=True, exist_ok=True)
    ours = ("quantization_report.json", "bench.json")
    for path in artifact.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name not in ours:
            (folder / path.name).write_bytes(path.read_bytes())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((artifact / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = section
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
