"""The document of a bench: what was measured, as plain data that docs/bench-schema.json describes."""

import hashlib
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from gemma_awq_cli import __version__
from gemma_awq_cli.bench.measurements import BenchModel, Measurements
from gemma_awq_cli.bench.model_kinds import OWN
from gemma_awq_cli.bench.request import BenchOptions
from gemma_awq_cli.bench.streams import Streams
from gemma_awq_cli.fidelity.evaluation_text import EvaluationText
from gemma_awq_cli.fidelity.metrics import Positions
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.staging import write_errors
from gemma_awq_cli.models.checkpoints.writing import json_bytes
from gemma_awq_cli.reports.artifact_files import BENCH
from gemma_awq_cli.system.processor import processor_model
from gemma_awq_cli.system.saving import write_whole

SCHEMA = 1


def bench_document(measured: Measurements) -> dict[str, Any]:
    """Return everything that was measured as plain data."""
    bandwidth = max(measured.bandwidths, default=None)
    return {
        "schema": SCHEMA,
        "complete": measured.complete,
        "started": measured.started,
        "settings": settings_record(measured.options),
        "environment": measured.environment,
        "bandwidth_bytes_per_second": bandwidth,
        "models": model_records(measured.models, measured.options, bandwidth),
        "left_out": measured.left_out,
    }


def settings_record(options: BenchOptions) -> dict[str, Any]:
    """Return the options as plain data."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(options).items()}


def model_records(models: Sequence[BenchModel], options: BenchOptions, bandwidth: float | None) -> list[dict[str, Any]]:
    """Return what was measured of each model. bandwidth: of the memory in bytes/s, None if it was not measured."""
    speeds = [speed_record(model, options, bandwidth) for model in models]
    records = []
    for model, speed in zip(models, speeds, strict=True):
        if speed is not None and speeds[0] is not None:
            speed["relative_to_first"] = _ratios(speed, speeds[0])
        records.append(
            {
                "name": model.name,
                "role": model.role,
                "kind": model.kind if model.role == "compare" and model.kind != OWN else _bits(model.checkpoint),
                "model_type": model.checkpoint.family.model_type,
                "bytes": _size(model),
                "identity": _identity(model),
                "speed": speed,
                "fidelity": model.fidelity,
                "tasks": model.tasks,
            }
        )
    return records


def _size(model: BenchModel) -> int:
    if model.file is not None:
        return model.file.stat().st_size
    return model.checkpoint.nbytes


def _identity(model: BenchModel) -> str:
    if model.file is None:
        return model.checkpoint.identity()
    with model.file.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _bits(checkpoint: Checkpoint) -> str:
    return "16-bit" if checkpoint.quantization is None else "4-bit"


def speed_record(model: BenchModel, options: BenchOptions, bandwidth: float | None) -> dict[str, Any] | None:
    """Return the samples of a model as rates with medians, extremes and percentiles; None if there is no sample."""
    if model.loaded is None or not model.samples:
        return None
    loaded, runs = model.loaded, []
    for (batch, depth), samples in model.samples.items():
        decode = _spread([batch * options.new_tokens / sample["decode"] for sample in samples])
        used = loaded["weight_bytes"] * decode["median"] / batch
        runs.append(
            {
                "batch": batch,
                "depth": depth,
                "repetitions": len(samples),
                "prompt_tokens_per_second": _spread([batch * options.prompt_tokens / s["first"] for s in samples]),
                "decode_tokens_per_second": decode,
                "ttft_seconds": _spread([sample["first"] for sample in samples]),
                "tpot_seconds": percentiles([step for sample in samples for step in sample["steps"]]),
                "bytes_per_second": used,
                "bandwidth_share": used / bandwidth if bandwidth else None,
            }
        )
    last = [sample for samples in model.samples.values() for sample in samples]
    vram = [sample["peak_vram"] for sample in last if sample["peak_vram"] is not None]
    return {
        "device": loaded["device"],
        "threads": loaded["threads"],
        "dtype": loaded["dtype"],
        "load_seconds": loaded["load_seconds"],
        "weight_bytes_per_token": loaded["weight_bytes"],
        "peak_rss_bytes": max(sample["peak_rss"] or 0 for sample in last) or None,
        "peak_vram_bytes": max(vram, default=None),
        "first_token_seconds": _spread(model.first_tokens) if model.first_tokens else None,
        "streams": [_streams_record(one) for one in model.streams],
        "drafts": _drafts_record(options.draft, model.drafts) if model.drafts is not None else None,
        "runs": runs,
    }


def _streams_record(measured: Streams) -> dict[str, Any]:
    return {
        "streams": measured.streams,
        "requests": len(measured.first),
        "tokens_per_second": measured.tokens / measured.seconds,
        "ttft_seconds": percentiles(measured.first),
        "tpot_seconds": percentiles(measured.steps) if measured.steps else None,
    }


def _drafts_record(draft: str | None, measured: Mapping[str, Any]) -> dict[str, Any]:
    return {"draft": draft, "way": measured["way"], "kinds": [_draft_record(kind) for kind in measured["kinds"]]}


def _draft_record(kind: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of one kind of text as rates. The speed-up is a ratio of each round, as both are of the same time."""
    return {
        **{name: kind[name] for name in ("kind", "tokens", "drafted_tokens", "accepted_tokens")},
        "decode_tokens_per_second": _spread([kind["tokens"] / seconds for seconds in kind["with"]]),
        "undrafted_tokens_per_second": _spread([kind["tokens"] / seconds for seconds in kind["without"]]),
        "speedup": _spread([before / after for before, after in zip(kind["without"], kind["with"], strict=True)]),
    }


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {"median": median(values), "min": min(values), "max": max(values), "samples": list(values)}


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return the mean and nearest-rank percentiles of values."""
    ordered = sorted(values)
    at = {f"p{p}": ordered[min(len(ordered) - 1, -(-p * len(ordered) // 100) - 1)] for p in (50, 90, 99)}
    return {"mean": sum(ordered) / len(ordered), **at}


def _ratios(speed: Mapping[str, Any], first: Mapping[str, Any]) -> dict[str, float]:
    """Median rates of the first batch size and depth, as multiples of the first model's."""
    return {
        name: speed["runs"][0][name]["median"] / first["runs"][0][name]["median"]
        for name in ("prompt_tokens_per_second", "decode_tokens_per_second")
    }


def fidelity_record(positions: Positions, text: EvaluationText) -> dict[str, Any]:
    """Return a comparison as plain data: the text, the summary, and how KL spreads over positions and over sizes."""
    summary, histogram = positions.summary(), positions.kl_histogram()
    return {
        "text": text.description,
        "text_sha256": text.sha256,
        "windows": len(text.rows),
        "window": text.rows.shape[1],
        "tokens": summary.tokens,
        "kl": summary.kl,
        "kl_median": summary.kl_median,
        "kl_p99": summary.kl_p99,
        "perplexity_16bit": summary.perplexity_reference,
        "perplexity": summary.perplexity_quantized,
        "perplexity_ratio": summary.perplexity_quantized / summary.perplexity_reference,
        "top1_agreement": summary.top1_agreement,
        "rms_probability_difference": summary.rms_probability_difference,
        "kl_along": [
            {"first": first, "end": end, "mean": mean}
            for first, end, mean in positions.kl_along(text.rows.shape[1] - 1)
        ],
        "kl_histogram": asdict(histogram),
    }


def save_beside(model: BenchModel, document: Mapping[str, Any]) -> Path:
    """Write the document with this model and the competitors into the artifact's folder. Returns the file."""
    own = model.checkpoint.identity()
    kept = [record for record in document["models"] if record["role"] == "compare" or record["identity"] == own]
    path = model.checkpoint.folder / BENCH
    with write_errors(model.checkpoint.folder, "measure without --save"):
        write_whole(path, json_bytes({**document, "models": kept}))
    return path


def environment(device: str) -> dict[str, Any]:
    """Return what speed depends on: the machine, and the versions of the libraries.

    device: as it was asked for, of several GPUs.
    """
    import torch
    import transformers

    cuda = torch.cuda.is_available()
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": processor_model(),
        "logical_processors": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name(device if device.startswith("cuda") else None) if cuda else None,
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "gemma_awq": __version__,
    }
