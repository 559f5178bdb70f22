"""The request: everything that a user can choose about one export, checked when it is made."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_awq_cli.errors import UsageError
from gemma_awq_cli.models.checkpoints.source import DEMO

GGUF = "gguf"
MLX = "mlx"
COMPRESSED_TENSORS = "compressed-tensors"
FORMAT_NAMES = (GGUF, COMPRESSED_TENSORS, MLX, "awq", "bf16", "fp16")
HEADS = ("q8_0", "q6_k", "bf16")
# Data types of scales, the default first.
SCALES = {MLX: ("float32", "float16", "bfloat16"), COMPRESSED_TENSORS: ("float16", "float32")}


@dataclass(frozen=True)
class ExportRequest:
    """One export, as it is asked for. An invalid value raises UsageError.

    model: the folder or hub id of a 4-bit checkpoint; format: one of `FORMAT_NAMES`; output: the folder to write, by
    default `NAME-FORMAT` in the current one; revision: branch, tag or commit of a hub id.
    compact: of `gguf`, linears in 5.0 bits per weight in place of 5.5; head: of `gguf`, the type of the embedding and
    the head, one of `HEADS`, by default q8_0.
    scales: of `mlx` and `compressed-tensors`, the dtype of scales, one of `SCALES`. `mlx` has float32 by default, and
    only float32 is exact there; `compressed-tensors` has float16, or float32 where float16 does not hold them.
    resume: continue an interrupted export of the same request; force: replace an export that is already in `output`.
    """

    model: str
    format: str
    output: Path | None = None
    revision: str | None = None
    compact: bool = False
    head: str | None = None
    scales: str | None = None
    resume: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        _require_one_of("format", self.format, FORMAT_NAMES)
        _require_one_of("head", self.head, (None, *HEADS))
        if self.format != GGUF and (self.compact or self.head is not None):
            option = "--compact" if self.compact else "--head"
            raise UsageError(f"{option} only applies to --to {GGUF}.", "Leave it out.")
        if self.format in SCALES:
            _require_one_of("scales", self.scales, (None, *SCALES[self.format]))
        elif self.scales is not None:
            raise UsageError(f"--scales only applies to --to {' and '.join(SCALES)}.", "Leave it out.")
        if self.model == DEMO:
            raise UsageError(
                "`demo` is a 16-bit model, and export takes a 4-bit one.",
                "Quantize it first: `gemma-awq quantize demo`, then export the artifact.",
            )

    def options(self) -> dict[str, Any]:
        """Return the options that the files' bytes depend on, by their names."""
        own: dict[str, Any] = {}
        if self.format == GGUF:
            own = {"compact": self.compact, "head": self.head or HEADS[0]}
        elif self.format in SCALES:
            own = {"scales": self.scales or SCALES[self.format][0]}
        return {"format": self.format, **own}


def _require_one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        listed = ", ".join(str(one) for one in allowed if one is not None)
        raise UsageError(f"Invalid {name}: {value!r}.", f"Choose one of {listed}.")
