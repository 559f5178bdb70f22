"""`--to bf16`, `--to fp16`: the weights that the integers stand for, for tools that read no 4-bit format."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from gemma_awq_cli.awq.grid import dequantize
from gemma_awq_cli.awq.packing import unpack_weight
from gemma_awq_cli.export.conversion import Conversion, Format
from gemma_awq_cli.export.safetensors_conversion import (
    SafetensorsConversion,
    Stack,
    TensorLayout,
    artifact_names,
    experts_stacked,
)
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.stated_config import stated_config
from gemma_awq_cli.models.gemma.families import FLOAT16_REASON
from gemma_awq_cli.models.gemma.layers import DOWN, GATE_UP

# A weight is at most 15 scales. Rounding moves it by at most half a unit in its last place, 2**-8 or 2**-11 of it, and
# by 2**-25 among the smallest numbers of float16; scales are at least 2**8 times as large.
_BFLOAT16 = 15 * 2.0**-8
_FLOAT16 = 15 * 2.0**-11 + 2.0**-8


def _converter(
    dtype: torch.dtype, bound: float, form: str
) -> Callable[[Checkpoint, str, Mapping[str, Any]], Conversion]:
    def convert(checkpoint: Checkpoint, *_: object) -> Conversion:
        name = str(dtype).removeprefix("torch.")
        layout = TensorLayout(
            form=form,
            key=artifact_names(checkpoint),
            stacks=_stacks,
            pack=lambda packed: {"weight": dequantize(*unpack_weight(packed)).to(dtype)},
            weight=lambda stored: stored["weight"].float(),
            bound=bound,
            tolerance=f"Each weight is rounded once, to the nearest value of {name}.",
            config=stated_config(checkpoint, name, None),
            kept=dtype,
        )
        return SafetensorsConversion(checkpoint, layout)

    return convert


def _stacks(linears: Sequence[str]) -> list[Stack]:
    """The experts of a layer in two tensors, as transformers has them, and everything else by itself."""
    return experts_stacked(linears, {GATE_UP: ("gate_proj", "up_proj"), DOWN: ("down_proj",)})


def _float16_refusal(checkpoint: Checkpoint, _: Mapping[str, Any]) -> str | None:
    return None if checkpoint.family.float16 else FLOAT16_REASON


BF16_FORMAT = Format("bf16", lambda *_: None, _converter(torch.bfloat16, _BFLOAT16, "bfloat16, dequantized"))
FP16_FORMAT = Format("fp16", _float16_refusal, _converter(torch.float16, _FLOAT16, "float16, dequantized"))
