"""What a bench has measured so far, model by model."""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from gemma_awq_cli.bench.events import OnEvent, OnProgress, Progress
from gemma_awq_cli.bench.model_kinds import GGUF, VLLM
from gemma_awq_cli.bench.process import WorkerEndedError
from gemma_awq_cli.bench.request import BenchOptions
from gemma_awq_cli.bench.streams import Streams
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.events import Note, Warned
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.staging import REPORT
from gemma_awq_cli.reports.stored_documents import read_quantization_report


@dataclass(eq=False)
class BenchModel:
    """One model of a bench and what is known of it so far.

    role: `model`, or `compare` for a competitor. kind: how it is opened (`model_kinds`). checkpoint: of the first model
    for vLLM, which runs its weights, and for a GGUF file. file: the GGUF file. loaded: the worker's answer to `load`.
    samples: the worker's answers to `sample` by batch size and depth. first_tokens: seconds from the start of the
    command to its first token. streams: of `gemma-awq serve`. drafts: the worker's answer to `drafts`.
    """

    name: str
    role: str
    kind: str
    checkpoint: Checkpoint
    file: Path | None = None
    loaded: dict[str, Any] | None = None
    samples: dict[tuple[int, int], list[dict[str, Any]]] = field(default_factory=dict)
    first_tokens: list[float] = field(default_factory=list)
    streams: list[Streams] = field(default_factory=list)
    drafts: dict[str, Any] | None = None
    fidelity: dict[str, Any] | None = None
    tasks: list[dict[str, Any]] = field(default_factory=list)

    @property
    def path(self) -> Path:
        """What is opened."""
        return self.file or self.checkpoint.folder

    @property
    def adapter(self) -> str | None:
        """The folder of the adapter that is merged into what is opened."""
        adapter = None if self.file is not None else self.checkpoint.adapter
        return None if adapter is None else str(adapter.folder)

    @cached_property
    def report(self) -> dict[str, Any] | None:
        """The quantization report of an artifact; None if this model is none."""
        if self.kind in (GGUF, VLLM):  # `checkpoint` is the first model's
            return None
        folder = self.checkpoint.folder
        return read_quantization_report(folder) if (folder / REPORT).is_file() else None


@dataclass
class Measurements:
    """A bench as it grows.

    environment: the machine and the libraries. bandwidths: the memory bandwidths measured so far, bytes/s. left_out:
    what was not measured, and why. complete: whether the bench came to its end.
    """

    options: BenchOptions
    on_event: OnEvent
    environment: dict[str, Any]
    models: list[BenchModel] = field(default_factory=list)
    bandwidths: list[float] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)
    complete: bool = False
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def note(self, text: str) -> None:
        """Report something that a person may want to know."""
        self.on_event(Note(text))

    def warn(self, text: str) -> None:
        """Report something that a person should know."""
        self.on_event(Warned(text))

    @property
    def on_progress(self) -> OnProgress:
        """Reports the progress of the stage."""
        return lambda done, total: self.on_event(Progress(done, total))

    def leave_out(self, model: str, part: str, error: GemmaAwqError) -> None:
        """Record and report that a part of a model is not measured."""
        self.warn(f"{model}: {part} left out. {error.message} {error.hint}".rstrip())
        if isinstance(error, WorkerEndedError) and error.output:
            self.warn(f"This is a bug, in this tool or in a library:\n{error.output}")
        self.left_out.append({"model": model, "part": part, "reason": error.message, "hint": error.hint})
