"""The options that several commands share, the choices of all options, and the checks that every argument passes."""

import functools
import inspect
import math
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

import typer

from gemma_awq_cli.awq.group_sizes import GROUP_SIZES
from gemma_awq_cli.cli import variables
from gemma_awq_cli.cli.help import CommandHelp
from gemma_awq_cli.errors import GemmaAwqError, Terminated, UsageError
from gemma_awq_cli.system.devices import DEVICES_HELP


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


class Qat(StrEnum):
    keep = "keep"
    ignore = "ignore"


class Head(StrEnum):
    bits16 = "16bit"
    int8 = "int8"
    int4 = "int4"


class ExportFormat(StrEnum):
    gguf = "gguf"
    compressed_tensors = "compressed-tensors"
    mlx = "mlx"
    awq = "awq"
    bf16 = "bf16"
    fp16 = "fp16"


class KvCache(StrEnum):
    bits16 = "16bit"
    int8 = "int8"


class GgufHead(StrEnum):
    q8_0 = "q8_0"
    q6_k = "q6_k"
    bf16 = "bf16"


class ScaleType(StrEnum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


GroupSize = StrEnum("GroupSize", {f"g{size}": str(size) for size in GROUP_SIZES})  # type: ignore[misc]

# Headings of the help that hold shared options. A command that has more options of the kind uses the same heading.
MODEL = "Model"
OUTPUT = "Output"
SPEED = "Memory and speed"

DeviceOption = Annotated[str, typer.Option(help=DEVICES_HELP, metavar="DEVICE", rich_help_panel=SPEED)]
HeadOption = Annotated[
    Head | None,
    typer.Option(
        help="Bits of the head's copy in memory.  [default: int4 for an artifact, 16bit for other models]",
        rich_help_panel=SPEED,
    ),
]
KvCacheOption = Annotated[
    KvCache | None,
    typer.Option(
        help="Bits of the keys and values of tokens that were read; int8 holds nearly twice as many tokens in the same "
        "memory (artifacts on compiled CPU kernels).  [default: 16bit]",
        rich_help_panel=SPEED,
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        help="Compute with N threads of the CPU.  [default: one per core]",
        metavar="N",
        min=1,
        max=4096,
        rich_help_panel=SPEED,
    ),
]
RevisionOption = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a hub id.", metavar="REV", rich_help_panel=MODEL)
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print the result as one JSON document on stdout.", rich_help_panel=OUTPUT)
]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print no notes and no progress on stderr.", rich_help_panel=OUTPUT)
]


def _go_offline(asked: bool) -> bool:
    if asked:
        from gemma_awq_cli.models.checkpoints.hub import go_offline

        go_offline()
    return asked


def _begin_debugging(ctx: typer.Context, asked: bool) -> bool:
    if asked and isinstance(ctx.obj, Debugging):
        ctx.obj.asked = True
    return asked


@dataclass
class Debugging:
    """Whether the command line asked for the traceback of any error."""

    asked: bool = False


# Options of every command and of the program itself. Typer carries out what they ask for.
OfflineOption = Annotated[
    bool,
    typer.Option(
        "--offline",
        callback=_go_offline,
        help="Do not contact the hub: take models and data sets from its cache.",
    ),
]
DebugOption = Annotated[
    bool, typer.Option("--debug", callback=_begin_debugging, help="Show the traceback of an error too.")
]


def with_common_options(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command that has the options of every command besides its own."""

    @functools.wraps(command)
    def wrapped(*, offline: bool, debug: bool, **own: Any) -> None:
        command(**own)

    common = {"offline": OfflineOption, "debug": DebugOption}
    signature = inspect.signature(command)
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
        for name, annotation in common.items()
    ]
    wrapped.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *added])  # type: ignore[attr-defined]
    wrapped.__annotations__ = {**command.__annotations__, **common}
    return wrapped


_MAY_BE_EMPTY = {"--system", "--stop"}  # no system message, no text to stop at
_LARGEST = 2**63 - 1  # the largest integer that the libraries accept


class Command(CommandHelp):
    """A command that rejects empty arguments, which unset shell variables leave, and numbers that nobody can mean.

    An empty path would be the current folder, an empty model would be the last artifact, and every model would meet a
    limit of NaN.
    """

    def __init__(self, name: str | None, **settings: Any) -> None:
        super().__init__(name, **settings)
        variables.set_variables(str(name), self.params)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _require_filled(args)
        rest = super().parse_args(ctx, args)
        variables.require_filled(ctx, self.params)
        for parameter in self.params:
            value = ctx.params.get(parameter.name)
            for single in value if isinstance(value, list | tuple) else (value,):
                _require_sound(variables.named(ctx, parameter), single)
        return rest

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # Typer would turn it into an exit code without a message
            raise Terminated(signal.SIGINT) from None
        except GemmaAwqError as error:
            variables.explain(error, ctx, self.params)
            raise


def _require_filled(args: Sequence[str]) -> None:
    before = ""
    for arg in args:
        name, equals, value = arg.partition("=")
        if equals and not value and name.startswith("--") and name not in _MAY_BE_EMPTY:
            raise UsageError(f"{name} is empty.", "Give it a value or leave it out.")
        if not arg and before.startswith("-") and before != "--":
            if before not in _MAY_BE_EMPTY:
                raise UsageError(f"{before} is empty.", "Give it a value or leave it out.")
        elif not arg:
            raise UsageError("An argument is empty.", "Give it a value or leave it out.")
        if "\0" in arg:
            raise UsageError(f"{arg!r} contains a NUL character.", "Remove it.")
        before = arg


def _require_sound(name: str, value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"Invalid value for {name}: {value}.", "Give a finite number.")
    if isinstance(value, int) and not -_LARGEST <= value <= _LARGEST:
        raise UsageError(f"Invalid value for {name}: {value}.", f"Give an integer from {-_LARGEST} to {_LARGEST}.")
