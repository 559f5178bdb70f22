"""The verb `bench`: speed and fidelity of models side by side, as one document.

Speed: every model in its own process, all loaded at once, a repetition of each in turn, so that what the machine does
meanwhile meets all of them alike. Fidelity: in this process, after those have ended. What was measured when a run is
interrupted is in the document, which then says that it is not complete.
"""

import os
import platform
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from gemma_awq_cli import __version__
from gemma_awq_cli.bench_process import Worker
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.measuring_speed import OWN
from gemma_awq_cli.models.checkpoint import Checkpoint
from gemma_awq_cli.models.files import read_json
from gemma_awq_cli.models.source import find_source
from gemma_awq_cli.models.staging import REPORT, write_errors
from gemma_awq_cli.models.writing import write_json

SCHEMA = 1
BENCH = "bench.json"  # the document beside an artifact's weights
# Competitors that are made of the 16-bit original: how it is opened, and the package and the extra that this needs.
ORIGINALS: Mapping[str, tuple[str, str | None]] = {
    "bf16": (OWN, None),
    "fp16": ("fp16", None),
    "int8": ("int8", "bitsandbytes"),
    "nf4": ("nf4", "bitsandbytes"),
}
WARM_UP_TOKENS = 16


@dataclass(frozen=True)
class Settings:
    """What is measured and how. threads, window, windows: None for what torch or the text allow."""

    speed: bool = True
    fidelity: bool = True
    prompt_tokens: int = 512
    new_tokens: int = 128
    batches: tuple[int, ...] = (1,)
    repetitions: int = 3
    warmup: int = 1
    threads: int | None = None
    device: str = "auto"
    text: str = "embedded"
    window: int | None = None
    windows: int | None = None
    reference: str | None = None
    compare: tuple[str, ...] = ()


@dataclass(eq=False)
class Entry:
    """One model of a bench and what is known of it so far. role: `model`, or `compare` for a competitor of those."""

    name: str
    role: str
    kind: str
    checkpoint: Checkpoint
    loaded: dict[str, Any] | None = None
    samples: dict[int, list[dict[str, Any]]] = field(default_factory=dict)  # by batch size
    fidelity: dict[str, Any] | None = None

    @property
    def report(self) -> dict[str, Any] | None:
        path = self.checkpoint.folder / REPORT
        return read_json(path) if path.is_file() else None


@dataclass
class Bench:
    """A bench as it grows. note, warn: what a person should know at once; left_out: what was not measured, and why."""

    settings: Settings
    note: Callable[[str], None]
    warn: Callable[[str], None]
    entries: list[Entry] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)
    bandwidths: list[float] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    complete: bool = False
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def add(self, models: Sequence[str]) -> None:
        """Find the models and their competitors; a model that is not there is an error, a competitor is left out."""
        self.environment = environment()
        for name in models:
            folder = find_source(name, None, self.note).folder
            self.entries.append(Entry(name, "model", OWN, Checkpoint(folder)))
        for name in self.settings.compare:
            try:
                self.entries.append(self._competitor(name))
            except GemmaAwqError as error:
                self.leave_out(name, "all", error)

    def _competitor(self, name: str) -> Entry:
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
        from gemma_awq_cli.measuring_fidelity import local_original

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
        load = {"device": settings.device, "threads": settings.threads}
        try:
            for entry in self.entries:
                running[entry] = Worker(entry.name, settings.threads)
                folder = str(entry.checkpoint.folder)
                entry.loaded = self._ask(running, entry, do="load", kind=entry.kind, folder=folder, **load)
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
            entry.samples.clear()
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
        """How far an entry is from its 16-bit original. on_steps: told how many steps there are, gives what to call."""
        import torch

        from gemma_awq_cli import measuring_fidelity as fidelity
        from gemma_awq_cli.calibration import find_recipe
        from gemma_awq_cli.models.opening import pick_device
        from gemma_awq_cli.models.prompting import Prompter

        if self.settings.threads is not None:
            torch.set_num_threads(self.settings.threads)
        if entry.checkpoint.quantization is None and self.settings.reference is None:
            raise GemmaAwqError(
                f"{entry.name} is a 16-bit model, and no other is named to compare it with.",
                "Name one with --reference, or measure its --speed alone.",
            )
        original = self.original(entry)
        settings = self.settings
        context = int(original.text_config.max_position_embeddings)
        text = fidelity.read_text(
            find_recipe(settings.text), Prompter(original.folder), context, settings.window, settings.windows
        )
        fidelity.require_same_base(original, entry.checkpoint, text)
        device = pick_device(settings.device)
        on_step = on_steps(fidelity.steps(text.rows, original.layers))
        positions = fidelity.measure(entry.checkpoint, original, text.rows, device, on_step)
        entry.fidelity = {
            "reference": settings.reference or original.folder.name,
            "text": text.description,
            "text_sha256": text.sha256,
            "windows": len(text.rows),
            "window": text.rows.shape[1],
            **fidelity.described(positions, text.rows.shape[1] - 1),
        }

    def document(self) -> dict[str, Any]:
        """All that was measured, as plain data: see docs/bench-schema.json."""
        settings = asdict(self.settings)
        bandwidth = max(self.bandwidths, default=None)
        speeds = [described_speed(entry, self.settings, bandwidth) for entry in self.entries]
        models = []
        for entry, speed in zip(self.entries, speeds, strict=True):
            if speed is not None and speeds[0] is not None:
                speed["relative_to_first"] = _ratios(speed, speeds[0])
            models.append(
                {
                    "name": entry.name,
                    "role": entry.role,
                    "kind": entry.kind if entry.role == "compare" and entry.kind != OWN else _kind(entry.checkpoint),
                    "model_type": entry.checkpoint.family.model_type,
                    "bytes": sum(info.nbytes for info in entry.checkpoint.tensors.values()),
                    "identity": entry.checkpoint.identity(),
                    "speed": speed,
                    "fidelity": entry.fidelity,
                }
            )
        return {
            "schema": SCHEMA,
            "complete": self.complete,
            "started": self.started,
            "settings": {**settings, "batches": list(settings["batches"]), "compare": list(settings["compare"])},
            "environment": self.environment,
            "bandwidth_bytes_per_second": bandwidth,
            "models": models,
            "left_out": self.left_out,
        }


def _kind(checkpoint: Checkpoint) -> str:
    return "16-bit" if checkpoint.quantization is None else "4-bit"


def described_speed(entry: Entry, settings: Settings, bandwidth: float | None) -> dict[str, Any] | None:
    """An entry's samples in rates: medians, extremes, percentiles. None if there is not one sample."""
    if entry.loaded is None or not entry.samples:
        return None
    loaded, runs = entry.loaded, []
    for batch, samples in entry.samples.items():
        decode = _spread([batch * settings.new_tokens / sample["decode"] for sample in samples])
        used = loaded["weight_bytes"] * decode["median"] / batch
        runs.append(
            {
                "batch": batch,
                "repetitions": len(samples),
                "prompt_tokens_per_second": _spread([batch * settings.prompt_tokens / s["first"] for s in samples]),
                "decode_tokens_per_second": decode,
                "ttft_seconds": _spread([sample["first"] for sample in samples]),
                "tpot_seconds": _percentiles([step for sample in samples for step in sample["steps"]]),
                "bytes_per_second": used,
                "bandwidth_share": used / bandwidth if bandwidth else None,
            }
        )
    last = [sample for samples in entry.samples.values() for sample in samples]
    vram = [sample["peak_vram"] for sample in last if sample["peak_vram"] is not None]
    return {
        "device": loaded["device"],
        "threads": loaded["threads"],
        "dtype": loaded["dtype"],
        "load_seconds": loaded["load_seconds"],
        "weight_bytes_per_token": loaded["weight_bytes"],
        "peak_rss_bytes": max(sample["peak_rss"] or 0 for sample in last) or None,
        "peak_vram_bytes": max(vram, default=None),
        "runs": runs,
    }


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {"median": median(values), "min": min(values), "max": max(values), "samples": list(values)}


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    """Mean and nearest-rank percentiles."""
    ordered = sorted(values)
    at = {f"p{p}": ordered[min(len(ordered) - 1, -(-p * len(ordered) // 100) - 1)] for p in (50, 90, 99)}
    return {"mean": sum(ordered) / len(ordered), **at}


def _ratios(speed: Mapping[str, Any], first: Mapping[str, Any]) -> dict[str, float]:
    """Median rates of the first batch size, as multiples of the first model's."""
    return {
        name: speed["runs"][0][name]["median"] / first["runs"][0][name]["median"]
        for name in ("prompt_tokens_per_second", "decode_tokens_per_second")
    }


def save_beside(entry: Entry, document: Mapping[str, Any]) -> Path:
    """Write the document, of its models this one and the competitors, into the artifact's folder."""
    own = entry.checkpoint.identity()
    models = [model for model in document["models"] if model["role"] == "compare" or model["identity"] == own]
    path = entry.checkpoint.folder / BENCH
    with write_errors(entry.checkpoint.folder, "measure without --save"):
        write_json(path, {**document, "models": models})
    return path


def environment() -> dict[str, Any]:
    """The machine and the libraries, as far as speed depends on them."""
    import torch
    import transformers

    cuda = torch.cuda.is_available()
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "logical_processors": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "gemma_awq": __version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
