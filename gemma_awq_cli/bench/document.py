"""The document of a bench: what was measured as plain data, described by docs/bench-schema.json."""

import hashlib
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from gemma_awq_cli import __version__
from gemma_awq_cli.bench.entries import BenchOptions, Entry
from gemma_awq_cli.bench.speed import OWN
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.staging import write_errors
from gemma_awq_cli.models.checkpoints.writing import json_bytes
from gemma_awq_cli.system.processor import processor_model
from gemma_awq_cli.system.saving import write_whole

SCHEMA = 1
BENCH = "bench.json"  # the document beside an artifact's weights


def described_models(entries: Sequence[Entry], settings: BenchOptions, bandwidth: float | None) -> list[dict[str, Any]]:
    """The models of a document. bandwidth: bytes a second, None if it was not measured."""
    speeds = [described_speed(entry, settings, bandwidth) for entry in entries]
    models = []
    for entry, speed in zip(entries, speeds, strict=True):
        if speed is not None and speeds[0] is not None:
            speed["relative_to_first"] = _ratios(speed, speeds[0])
        models.append(
            {
                "name": entry.name,
                "role": entry.role,
                "kind": entry.kind if entry.role == "compare" and entry.kind != OWN else _kind(entry.checkpoint),
                "model_type": entry.checkpoint.family.model_type,
                "bytes": _size(entry),
                "identity": _identity(entry),
                "speed": speed,
                "fidelity": entry.fidelity,
                "tasks": entry.tasks,
            }
        )
    return models


def _size(entry: Entry) -> int:
    if entry.file is not None:
        return entry.file.stat().st_size
    return sum(info.nbytes for info in entry.checkpoint.tensors.values())


def _identity(entry: Entry) -> str:
    if entry.file is None:
        return entry.checkpoint.identity()
    with entry.file.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def described_settings(settings: BenchOptions) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(settings).items()}


def _kind(checkpoint: Checkpoint) -> str:
    return "16-bit" if checkpoint.quantization is None else "4-bit"


def described_speed(entry: Entry, settings: BenchOptions, bandwidth: float | None) -> dict[str, Any] | None:
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
        write_whole(path, json_bytes({**document, "models": models}))
    return path


def environment() -> dict[str, Any]:
    """The machine and the libraries, as far as speed depends on them."""
    import torch
    import transformers

    cuda = torch.cuda.is_available()
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": processor_model(),
        "logical_processors": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "gemma_awq": __version__,
    }
