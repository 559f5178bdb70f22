"""What a bench is asked for, and its models with what was measured of each."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma_awq_cli.bench.speed import GGUF, OWN, VLLM
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.staging import REPORT
from gemma_awq_cli.reports.stored_documents import read_quantization_report

# Competitors that are made of the 16-bit original: how it is opened, and the package and the extra that this needs.
ORIGINALS: Mapping[str, tuple[str, str | None]] = {
    "bf16": (OWN, None),
    "fp16": ("fp16", None),
    "int8": ("int8", "bitsandbytes"),
    "nf4": ("nf4", "bitsandbytes"),
}


@dataclass(frozen=True)
class BenchOptions:
    """What is measured and how. threads, window, windows: None for what torch or the text allow.

    tasks: names for lm-evaluation-harness, none for no tasks; task_limit: questions of each, None for all.
    """

    speed: bool = True
    fidelity: bool = True
    prompt_tokens: int = 512
    new_tokens: int = 128
    batches: tuple[int, ...] = (1,)
    repetitions: int = 3
    warmup: int = 1
    threads: int | None = None
    device: str = "auto"
    tasks: tuple[str, ...] = ()
    task_limit: int | None = None
    confirm_run_unsafe_code: bool = False
    text: str = "embedded"
    window: int | None = None
    windows: int | None = None
    reference: str | None = None
    compare: tuple[str, ...] = ()


@dataclass(eq=False)
class Entry:
    """One model of a bench and what is known of it so far. role: `model`, or `compare` for a competitor of those.

    file: a GGUF; `checkpoint` is then the first model's, as it is for vLLM.
    """

    name: str
    role: str
    kind: str
    checkpoint: Checkpoint
    file: Path | None = None
    loaded: dict[str, Any] | None = None
    samples: dict[int, list[dict[str, Any]]] = field(default_factory=dict)  # by batch size
    fidelity: dict[str, Any] | None = None
    tasks: list[dict[str, Any]] = field(default_factory=list)

    @property
    def path(self) -> Path:
        """What is opened."""
        return self.file or self.checkpoint.folder

    @property
    def report(self) -> dict[str, Any] | None:
        """The quantization report of an artifact that this entry itself is."""
        if self.kind in (GGUF, VLLM):  # `checkpoint` is the first model's
            return None
        folder = self.checkpoint.folder
        return read_quantization_report(folder) if (folder / REPORT).is_file() else None
