"""Reading an artifact's packed linears, each checked."""

import torch

from gemma_awq_cli.awq.packing import PackedWeight
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.expected_tensors import packed_tensors, require_tensors
from gemma_awq_cli.models.checkpoints.quantization_config import awq_group_size
from gemma_awq_cli.models.checkpoints.weight_files import read_tensors, require_finite


def require_awq(checkpoint: Checkpoint) -> int:
    """The group size of an AutoAWQ GEMM artifact; an error for any other kind of quantization."""
    return awq_group_size(checkpoint.quantization or {}, checkpoint.folder)


def read_packed(
    checkpoint: Checkpoint, name: str, in_features: int, out_features: int, group_size: int
) -> PackedWeight:
    """Read one linear: packed int32 integers, and scales converted to float16 and checked to be finite."""
    base = checkpoint.key(f"{name}.weight").removesuffix(".weight")
    expected = packed_tensors(base, in_features, out_features, group_size)
    require_tensors(checkpoint.tensors, expected, checkpoint.folder)
    tensors = read_tensors(checkpoint.tensors, expected)
    packed = PackedWeight(*(tensors[f"{base}.{kind}"] for kind in PackedWeight._fields))
    packed = packed._replace(scales=packed.scales.to(torch.float16))
    require_finite(f"{base}.scales", packed.scales)
    return packed
