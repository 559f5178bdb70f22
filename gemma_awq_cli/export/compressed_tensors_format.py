"""`--to compressed-tensors`: integers, zero points and scales as llm-compressor writes them and vLLM reads them.

Source of the layout: compressed-tensors 0.20, `compressors/pack_quantized` (its signed integers are stored with 8
added, which gives back AWQ's 0..15) and `quantization/quant_config.py`.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from gemma_awq_cli.awq.grid import Grid, dequantize
from gemma_awq_cli.awq.packing import PackedWeight
from gemma_awq_cli.awq.repacking import pack_in_order, repack_rows, unpack_in_order
from gemma_awq_cli.export.conversion import Conversion, Format
from gemma_awq_cli.export.safetensors_conversion import SafetensorsConversion, TensorLayout, artifact_names, each_alone
from gemma_awq_cli.export.source_facts import group_size_of, not_converted, scale_dtype, stored_dtype
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.stated_config import BITS, stated_config

FORMAT = "pack-quantized"
VERSION = "0.20.0"  # of the library whose config this is


def convert(checkpoint: Checkpoint, _: str, options: Mapping[str, Any]) -> Conversion:
    """Start a conversion. Weights that are not packed stay as they are.

    The library multiplies in the dtype of the scales, so float32 ones give it the exact weight, and float16 ones the
    weight rounded to float16. vLLM converts scales to the model's dtype.
    """
    scales = max(scale_dtype(checkpoint), getattr(torch, options["scales"]), key=lambda dtype: dtype.itemsize)
    kept = ignored(not_converted(checkpoint))
    layout = TensorLayout(
        form="compressed-tensors, pack-quantized int4 with zero points",
        key=artifact_names(checkpoint),
        stacks=each_alone,
        pack=lambda packed: pack(packed._replace(scales=packed.scales.to(scales))),
        weight=_weight,
        bound=0.0,
        tolerance="None: integers, zero points and scales are the same.",
        config=stated_config(
            checkpoint, stored_dtype(checkpoint), quantization_section(group_size_of(checkpoint), kept)
        ),
    )
    return SafetensorsConversion(checkpoint, layout)


def pack(packed: PackedWeight) -> dict[str, Tensor]:
    """Return the tensors of one linear by their names.

    weight_packed: int32 [N, K/8]; weight_zero_point: int32 [N/8, G], packed along N; weight_scale: [N, G];
    weight_shape: int64 [2], N and K.
    """
    rows = repack_rows(packed)
    shape = (rows.q.shape[0], packed.qweight.shape[0])
    return {
        "weight_packed": rows.q,
        "weight_scale": rows.scale,
        "weight_zero_point": pack_in_order(rows.zero.t()).t().contiguous(),
        "weight_shape": torch.tensor(shape, dtype=torch.int64, device=rows.q.device),
    }


def _weight(stored: Mapping[str, Tensor]) -> Tensor:
    zero = unpack_in_order(stored["weight_zero_point"].t()).t()
    return dequantize(unpack_in_order(stored["weight_packed"]), Grid(stored["weight_scale"].float(), zero.float()))


def ignored(names: Iterable[str]) -> list[str]:
    """Return the `ignore` list for names of `modules_to_not_convert`, which list a module under several spellings.

    compressed-tensors, and so transformers, and vLLM match `re:` patterns from the start of a module's name. Each of
    their names has another beginning, so a pattern is an entry wherever it stands.
    """
    plain = dict.fromkeys(name.removeprefix("model.").removeprefix(".*") for name in names)
    ends = {name: "$" if name.startswith("layers.") else ".*" for name in plain}
    needed = (name for name in plain if not any(other != name and other in name for other in plain))
    return [f"re:.*{name.replace('.', '[.]')}{ends[name]}" for name in needed]


def quantization_section(group_size: int, kept: list[str]) -> dict[str, Any]:
    """Return the section of config.json as compressed-tensors writes it. kept: see `ignored`."""
    weights = {
        "num_bits": BITS,
        "type": "int",
        "symmetric": False,
        "group_size": group_size,
        "strategy": "group",
        "dynamic": False,
    }
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": FORMAT,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": kept,
        "kv_cache_scheme": None,
        # transformers unpacks the weights when it loads them: its other way, in the first forward, does not expect that
        # zero points are packed (compressed-tensors 0.20 with transformers 5.23)
        "dequantize": True,
        "version": VERSION,
    }


COMPRESSED_TENSORS_FORMAT = Format("compressed-tensors", lambda *_: None, convert)
