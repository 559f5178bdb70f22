"""Reading an artifact's packed linears, each checked."""

from collections.abc import Mapping

import torch

from gemma_awq_cli.awq.packing import PackedWeight
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.expected_tensors import Expected, packed_tensors, require_tensors
from gemma_awq_cli.models.checkpoints.quantization_config import awq_group_size
from gemma_awq_cli.models.checkpoints.weight_files import read_tensors, require_finite
from gemma_awq_cli.models.gemma.layers import Linear


def require_awq(checkpoint: Checkpoint) -> int:
    """The group size of an AutoAWQ GEMM artifact; an error for any other kind of quantization."""
    return awq_group_size(checkpoint.quantization or {}, checkpoint.folder)


def read_packed(
    checkpoint: Checkpoint, name: str, in_features: int, out_features: int, group_size: int
) -> PackedWeight:
    """Read one linear: packed int32 integers, and scales converted to float16 and checked to be finite."""
    return read_packed_linears(checkpoint, {name: Linear(out_features, in_features)}, group_size)[name]


def read_packed_linears(
    checkpoint: Checkpoint, linears: Mapping[str, Linear], group_size: int
) -> dict[str, PackedWeight]:
    """Read several linears as `read_packed` does, by name. Every file is opened once: experts are thousands."""
    bases = {name: checkpoint.key(f"{name}.weight").removesuffix(".weight") for name in linears}
    expected: dict[str, Expected] = {}
    for name, linear in linears.items():
        expected |= packed_tensors(bases[name], linear.inputs, linear.outputs, group_size)
    require_tensors(checkpoint.tensors, expected, checkpoint.folder)
    tensors = read_tensors(checkpoint.tensors, expected)
    found = {}
    for name, base in bases.items():
        packed = PackedWeight(*(tensors[f"{base}.{kind}"] for kind in PackedWeight._fields))
        found[name] = packed._replace(scales=packed.scales.to(torch.float16))
        require_finite(f"{base}.scales", found[name].scales)
    return found
