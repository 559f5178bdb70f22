"""The options that more than one command takes, the choices of those that only one does, and what no option may be."""

import math
import signal
from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from gemma_awq_cli.errors import Terminated, UsageError


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


class StoredDtype(StrEnum):
    bfloat16 = "bfloat16"
    float16 = "float16"


class ComputeDtype(StrEnum):
    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


class Quantization(StrEnum):
    int8 = "int8"
    nf4 = "nf4"


class Attention(StrEnum):
    sdpa = "sdpa"
    eager = "eager"
    flash_attention_2 = "flash_attention_2"


class EngineName(StrEnum):
    local = "local"
    vllm = "vllm"


class QualityName(StrEnum):
    fast = "fast"
    balanced = "balanced"
    best = "best"


class Head(StrEnum):
    bits16 = "16bit"
    int8 = "int8"
    int4 = "int4"


class GroupSize(StrEnum):
    g128 = "128"
    g64 = "64"
    g32 = "32"


DeviceOption = Annotated[Device, typer.Option(help="Where to compute.")]
HeadOption = Annotated[
    Head | None,
    typer.Option(help="Bits of the head's copy in memory.  [default: int4 for an artifact, else 16bit]"),
]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.", metavar="REV")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout instead.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No notes and no progress on stderr.")]

_EMPTY_IS_MEANT = {"--system", "--stop"}  # no system message, no text to end before
_LARGEST = 2**63 - 1  # what libraries take for a number


class Command(TyperCommand):
    """A command that takes no empty argument, as an unset shell variable makes them, and no number out of this world.

    An empty path would be the current folder, an empty model the last artifact, and a bound that is not a number would
    be kept by everything.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _require_filled(args)
        rest = super().parse_args(ctx, args)
        for name, value in ctx.params.items():
            for single in value if isinstance(value, list | tuple) else (value,):
                _require_sound(f"--{name.replace('_', '-')}", single)
        return rest

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # Typer would make an exit code of it, and nobody could say what happened
            raise Terminated(signal.SIGINT) from None


def _require_filled(args: Sequence[str]) -> None:
    before = ""
    for arg in args:
        name, equals, value = arg.partition("=")
        if equals and not value and name.startswith("--") and name not in _EMPTY_IS_MEANT:
            raise UsageError(f"{name} is empty.", "Give it a value, or leave it out.")
        if not arg and before.startswith("-") and before != "--":
            if before not in _EMPTY_IS_MEANT:
                raise UsageError(f"{before} is empty.", "Give it a value, or leave it out.")
        elif not arg:
            raise UsageError("An argument is empty.", "Give it a value, or leave it out.")
        if "\0" in arg:
            raise UsageError(f"{arg!r} holds a NUL character.", "Leave it out.")
        before = arg


def _require_sound(name: str, value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{name} is {value}, which is not a number to compute with.", "Give a finite number.")
    if isinstance(value, int) and not -_LARGEST <= value <= _LARGEST:
        raise UsageError(f"{name} is too large.", f"Give at most {_LARGEST}.")
