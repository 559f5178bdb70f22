"""The verb `bench`: speed, fidelity and task scores of models side by side, as one document.

Speed: every model in its own process, all loaded at once, a repetition of each in turn, so that what the machine does
meanwhile meets all of them alike. Fidelity: after those have ended, of an artifact in this process, of what another
library holds in one of its own. Tasks: every model in its own process, one after another, where a task that fails
leaves the others. What was measured when a run is interrupted is in the document, which then says that it is not
complete.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.util import find_spec
from typing import Any

from gemma_awq_cli.bench.document import SCHEMA, described_models, described_settings, environment
from gemma_awq_cli.bench.entries import ORIGINALS, BenchOptions, Entry
from gemma_awq_cli.bench.llama_cpp import require_llama_cpp
from gemma_awq_cli.bench.process import Worker, WorkerEndedError
from gemma_awq_cli.bench.speed import GGUF, OWN, PRECISIONS, VLLM
from gemma_awq_cli.bench.task_suites import LACKING
from gemma_awq_cli.bench.tasks import TaskSpec, find_tasks, published
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.generate.vllm_engine import INSTALL
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.source import find_source
from gemma_awq_cli.models.checkpoints.staging import REPORT
from gemma_awq_cli.system.reading import home_path

WARM_UP_TOKENS = 16


@dataclass
class Bench:
    """A bench as it grows. note, warn: what a person should know at once; left_out: what was not measured, and why."""

    settings: BenchOptions
    note: Callable[[str], None]
    warn: Callable[[str], None]
    entries: list[Entry] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)
    specs: list[TaskSpec] = field(default_factory=list)
    bandwidths: list[float] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    complete: bool = False
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def add(self, models: Sequence[str]) -> None:
        """Find the models, their competitors and the tasks; an error for all but a competitor, which is left out."""
        self.environment = environment()
        if self.settings.tasks:
            self.specs = find_tasks(self.settings.tasks)
            if any(spec.suite == "safety" for spec in self.specs):
                self.note(f"On the model card but no tasks of lm-evaluation-harness: {', '.join(LACKING)}.")
        for name in models:
            folder = find_source(name, None, self.note).folder
            checkpoint = Checkpoint(folder)
            for line in checkpoint.notes:
                self.warn(f"{name}: {line}")
            self.entries.append(Entry(name, "model", OWN, checkpoint))
        for name in self.settings.compare:
            try:
                self.entries.append(self._competitor(name))
            except GemmaAwqError as error:
                self.leave_out(name, "all", error)

    def _competitor(self, name: str) -> Entry:
        if name == VLLM:
            if find_spec(VLLM) is None:
                raise GemmaAwqError("vLLM is not installed.", INSTALL)
            return Entry(name, "compare", VLLM, self.entries[0].checkpoint)
        if name.endswith(f".{GGUF}"):
            file = home_path(name)
            if not file.is_file():
                raise GemmaAwqError(f"There is no file {name}.", "Give the path of a GGUF file.")
            require_llama_cpp()
            return Entry(name, "compare", GGUF, self.entries[0].checkpoint, file)
        if name not in ORIGINALS:
            return Entry(name, "compare", OWN, Checkpoint(find_source(name, None, self.note).folder))
        kind, package = ORIGINALS[name]
        if package is not None and find_spec(package) is None:
            raise GemmaAwqError(f"{package} is not installed.", 'Install it: pip install "gemma-awq[bnb]"')
        model = self.entries[0]
        original = self.original(model) if model.checkpoint.quantization is not None else model.checkpoint
        return Entry(name, "compare", kind, original)

    def original(self, entry: Entry) -> Checkpoint:
        """The 16-bit original of an artifact: --reference, else what its report names, if that is on this machine."""
        from gemma_awq_cli.fidelity.comparison import local_original

        report, hint = entry.report, "Name the 16-bit original with --reference (a folder or a hub id)."
        if (given := self.settings.reference) is not None:
            original = Checkpoint(find_source(given, None, self.note).folder)
        elif report is None:
            raise GemmaAwqError(f"{entry.name} has no {REPORT} that names its 16-bit original.", hint)
        else:
            found = local_original(report)
            if found is None:
                raise GemmaAwqError(f"The 16-bit original, {report['source']['model']}, is not on this machine.", hint)
            original = Checkpoint(find_source(found, None, self.note).folder)
        if report is not None and original.identity() != report["fingerprint"]["model"]:
            said = f"{original.folder} is not the very checkpoint that {entry.name} was quantized from"
            if given is None:
                raise GemmaAwqError(f"{said}.", hint)
            self.warn(f"{said}: its weights or its config differ.")
        return original

    def leave_out(self, model: str, part: str, error: GemmaAwqError) -> None:
        self.warn(f"{model}: {part} left out. {error.message} {error.hint}".rstrip())
        self.left_out.append({"model": model, "part": part, "reason": error.message, "hint": error.hint})

    def speed_steps(self) -> int:
        return len(self.entries) * (1 + len(self.settings.batches) * (self.settings.warmup + self.settings.repetitions))

    def measure_speed(self, on_step: Callable[[], None]) -> None:
        """Every model's speed, one repetition of each in turn."""
        settings = self.settings
        running: dict[Entry, Worker] = {}
        tokens = settings.prompt_tokens + settings.new_tokens + 1
        load = {"device": settings.device, "threads": settings.threads, "rows": max(settings.batches), "tokens": tokens}
        try:
            for entry in self.entries:
                running[entry] = Worker(entry.name, settings.threads)
                entry.loaded = self._ask(running, entry, do="load", kind=entry.kind, path=str(entry.path), **load)
                on_step()
            for batch in settings.batches:
                for turn in range(-settings.warmup, settings.repetitions):
                    prompts = self._prompts(batch, turn)
                    tokens = settings.new_tokens if turn >= 0 else min(settings.new_tokens, WARM_UP_TOKENS)
                    order = list(running)
                    first = turn % len(order)
                    for entry in (*order[first:], *order[:first]):
                        sample = self._ask(running, entry, do="sample", prompts=prompts, new_tokens=tokens)
                        if sample is not None and turn >= 0:
                            entry.samples.setdefault(batch, []).append(sample)
                        on_step()
                    self.bandwidths.append(next(iter(running.values())).ask(do="bandwidth")["bytes_per_second"])
        finally:
            for worker in running.values():
                worker.end()

    def _ask(self, running: "dict[Entry, Worker]", entry: Entry, **request: Any) -> dict[str, Any] | None:
        """The answer; None if a competitor failed, which is left out from then on; a model that fails is an error."""
        try:
            return running[entry].ask(**request)
        except GemmaAwqError as error:
            if entry.role == "model":
                raise
            running.pop(entry).end()
            entry.samples.pop(len(request.get("prompts", ())), None)  # of the batch size that it was at
            self.leave_out(entry.name, "speed", error)
            return None

    def _prompts(self, batch: int, turn: int) -> list[list[int]]:
        """Fresh prompts [batch, prompt_tokens] of random tokens: the same for every model, and in every bench."""
        rng = random.Random(f"{batch} {turn}")
        loaded = [entry.loaded for entry in self.entries if entry.loaded is not None]
        bos, vocabulary = loaded[0]["bos"], min(facts["vocabulary"] for facts in loaded)
        return [
            [bos, *(rng.randrange(vocabulary) for _ in range(self.settings.prompt_tokens - 1))] for _ in range(batch)
        ]

    def measure_fidelity(self, entry: Entry, on_steps: Callable[[int], Callable[[], None]]) -> None:
        """How far an entry is from its 16-bit original: by its stored weights, or as it runs if another library holds
        them. on_steps: told how many steps there are, gives what to call.
        """
        import torch

        from gemma_awq_cli.fidelity import comparison as fidelity
        from gemma_awq_cli.models.forward.loading import pick_device

        settings, first = self.settings, self.entries[0]
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        owner = first if entry.kind != OWN else entry
        if owner.checkpoint.quantization is None and settings.reference is None and entry.kind == OWN:
            raise GemmaAwqError(
                f"{entry.name} is a 16-bit model, and no other is named to compare it with.",
                "Name one with --reference, or measure its --speed alone.",
            )
        if entry.kind in PRECISIONS:
            original = entry.checkpoint
        elif owner.checkpoint.quantization is None and settings.reference is None:
            original = owner.checkpoint
        else:
            original = self.original(owner)
        if entry.kind == OWN:
            text = fidelity.read_asked(original, settings.text, settings.window, settings.windows)
            fidelity.require_same_base(original, entry.checkpoint, text)
            on_step = on_steps(fidelity.steps(text.rows, original.layers))
            device = pick_device(settings.device)
            positions = fidelity.measure(entry.checkpoint, original, text.rows, device, on_step)
            result = {"arithmetic": "stored weights in float32", **fidelity.described(positions, text)}
        else:
            result = {"arithmetic": "as it runs", **self._running_fidelity(entry, original, on_steps)}
        entry.fidelity = {"reference": settings.reference or original.folder.name, **result}

    def _running_fidelity(
        self, entry: Entry, original: Checkpoint, on_steps: Callable[[int], Callable[[], None]]
    ) -> dict[str, Any]:
        settings, worker = self.settings, Worker(entry.name, self.settings.threads)
        steps: list[Callable[[], None]] = []

        def on_progress(done: int, total: int) -> None:
            steps[:] = steps or [on_steps(total)]
            steps[0]()

        try:
            return worker.ask(
                on_progress, do="fidelity", kind=entry.kind, path=str(entry.path), reference=str(original.folder),
                text=settings.text, window=settings.window, windows=settings.windows, device=settings.device,
                threads=settings.threads,
            )  # fmt: skip
        finally:
            worker.end()

    def measure_tasks(self, entry: Entry, on_task: Callable[[TaskSpec], Callable[[int, int], None]]) -> None:
        """An entry's score in every task. on_task: told which one begins, gives what to tell how far it is."""
        settings, worker = self.settings, None
        if entry.kind in (GGUF, VLLM):
            reason = "Tasks are answered by models that this tool opens itself."
            self.leave_out(entry.name, "tasks", GemmaAwqError(reason))
            return
        where: dict[str, Any] = {"device": settings.device, "threads": settings.threads}
        try:
            for spec in self.specs:
                on_progress = on_task(spec)
                try:
                    if worker is None:
                        worker = Worker(entry.name, settings.threads)
                        worker.ask(do="open", kind=entry.kind, path=str(entry.path), **where)
                    result = worker.ask(
                        on_progress, do="task", spec=asdict(spec), limit=settings.task_limit,
                        unsafe_code=settings.confirm_run_unsafe_code,
                    )  # fmt: skip
                except WorkerEndedError as error:
                    assert worker is not None
                    worker.end()
                    worker = None  # the next task gets a new one
                    self.leave_out(entry.name, f"task {spec.name}", error)
                except GemmaAwqError as error:
                    self.leave_out(entry.name, f"task {spec.name}", error)
                else:
                    entry.tasks.append({**result, "published": published(self._names(entry), spec.task, spec.suite)})
        finally:
            if worker is not None:
                worker.end()

    def _names(self, entry: Entry) -> list[str]:
        """What an entry and the 16-bit model that it was made of are called, by which the model card knows them."""
        names = [entry.name, str(entry.checkpoint.folder)]
        report = (entry if entry.report or entry.role == "model" else self.entries[0]).report
        return names if report is None else [*names, str(report["source"]["model"])]

    def document(self) -> dict[str, Any]:
        """All that was measured, as plain data: see docs/bench-schema.json."""
        bandwidth = max(self.bandwidths, default=None)
        return {
            "schema": SCHEMA,
            "complete": self.complete,
            "started": self.started,
            "settings": described_settings(self.settings),
            "environment": self.environment,
            "bandwidth_bytes_per_second": bandwidth,
            "models": described_models(self.entries, self.settings, bandwidth),
            "left_out": self.left_out,
        }
