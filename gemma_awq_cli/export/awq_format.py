"""`--to awq`: AutoAWQ's GEMM layout from any checkpoint that can be read, as `quantize` writes it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from gemma_awq_cli.awq.grid import dequantize
from gemma_awq_cli.awq.packing import PackedWeight, unpack_weight
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.export.conversion import Conversion, Format
from gemma_awq_cli.export.safetensors_conversion import SafetensorsConversion, TensorLayout, artifact_names, each_alone
from gemma_awq_cli.export.source_facts import group_size_of, not_converted, stored_dtype
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.stated_config import awq_section, stated_config
from gemma_awq_cli.models.gemma.left_groups import find_left_groups, joined_names


def convert(checkpoint: Checkpoint, *_: object) -> Conversion:
    """Start a conversion. Other weights stay as they are, and a head that is the embedding is not repeated."""
    packed = [checkpoint.packed(index).keys() for index in range(checkpoint.layers)]
    left = find_left_groups(checkpoint.shape.layouts, packed)[0]
    section = awq_section(group_size_of(checkpoint), [*not_converted(checkpoint), *joined_names(left)])
    layout = TensorLayout(
        form="AWQ, AutoAWQ's GEMM layout",
        key=artifact_names(checkpoint),
        stacks=each_alone,
        pack=_pack,
        weight=_weight,
        bound=0.0,
        tolerance="None: integers, zero points and scales are the same.",
        config=stated_config(checkpoint, stored_dtype(checkpoint), section),
    )
    return SafetensorsConversion(checkpoint, layout)


def _pack(packed: PackedWeight) -> dict[str, Tensor]:
    scales = packed.scales.to(torch.float16)
    if scales.device.type != "meta" and not torch.equal(scales.to(packed.scales.dtype), packed.scales):
        raise GemmaAwqError(
            "Some scales of this checkpoint have no exact value in float16, which AutoAWQ's layout requires.",
            "Export with --to compressed-tensors, which also holds float32.",
        )
    return packed._replace(scales=scales)._asdict()


def _weight(stored: Mapping[str, Tensor]) -> Tensor:
    return dequantize(*unpack_weight(PackedWeight(**stored)))


AWQ_FORMAT = Format("awq", lambda *_: None, convert)
