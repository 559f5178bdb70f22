"""The options that more than one command takes, and the choices of those that only one does."""

from enum import StrEnum
from typing import Annotated

import typer


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
