"""A report and a bench that use every field of their schemas, and ways through their leaves."""

import copy
import json
from collections.abc import Iterator
from typing import Any

Place = tuple[Any, ...]
HASH = "0123456789abcdef" * 4


def full_report() -> dict[str, Any]:
    group = {
        "name": "qkv", "linears": ["self_attn.q_proj"], "method": "search", "exponents": [0.5, 0.0], "error": 0.5,
        "rtn_error": 1.0, "gram_block": 0, "kept": {"groups": 64, "on_grid": 63, "exact": 62},
    }  # fmt: skip
    arguments = {
        "quality": "balanced", "group_size": 128, "calibration": "wikitext", "num_samples": 128, "seq_len": 512,
        "seed": 0, "dataset_config": "raw", "dataset_split": "train", "text_column": "text", "device": "cpu",
        "dtype": "bfloat16", "max_memory": 6000000000,
    }  # fmt: skip
    return {
        "schema": 2,
        "source": {
            "model": "google/gemma-2b", "revision": "0" * 40, "model_type": "gemma",
            "config_sha256": HASH, "bytes": 10**9,
            "card": {"license": "gemma", "license_name": "x", "license_link": "y", "base_model": "google/gemma-7b"},
        },
        "artifact": {"bytes": 10**8, "bits": 4, "group_size": 128, "dtype": "bfloat16", "quantized_linears": 18,
                     "left_in_16_bits": ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj",
                                         "model.layers.1.self_attn.o_proj"]},
        "arguments": arguments,
        "calibration": {
            "text": "wikitext (hub dataset Salesforce/wikitext, raw, train)", "rows": 128, "seq_len": 512,
            "sha256": HASH,
        },
        "fidelity": {
            "heldout_tokens": 3000, "heldout_sha256": HASH, "kl": 0.01, "perplexity_16bit": 10.0,
            "perplexity_4bit": 10.5, "top1_agreement": 0.95,
        },
        "budget": {
            "max_kl": 0.02, "max_bytes": 2 * 10**8, "file_bytes": 10**8 + 9000,
            "tried": [
                {"group_size": 128, "linears_in_16_bits": 0, "file_bytes": 9 * 10**7, "kl": 0.03},
                {"group_size": 128, "linears_in_16_bits": 3, "file_bytes": 10**8 + 9000, "kl": 0.01},
            ],
            "sensitivities": {
                "group_size": 128, "tokens": 1024,
                "groups": [{"layer": 0, "group": "gate_up", "kl": 0.01}, {"layer": 1, "group": "o", "kl": 0.001}],
            },
        },
        "qat": {"groups": 256, "on_grid": 252, "exact": 248},
        "verified": {"linears": 21, "other_tensors": 3, "autoawq": None, "linears_compared_with_autoawq": 0},
        "layers": [[dict(group), {**group, "name": "o"}], [dict(group), {**group, "name": "o"}]],
        "fingerprint": {"gemma-awq": "1.0", "model": HASH, **arguments, "processor": "x86_64", "torch": "2.13.0+cpu"},
        "versions": {
            "gemma_awq": "1.0", "torch": "2.13.0+cpu", "transformers": "5.0", "safetensors": "0.8", "python": "3.11.2",
        },
        "run": {
            "finished": "2026-11-26T07:34:23+00:00", "seconds": 1.5, "machine": "Linux x86_64", "threads": 2,
            "peak_memory_bytes": 10**8, "peak_vram_bytes": None,
        },
    }  # fmt: skip


def full_bench() -> dict[str, Any]:
    spread = {"median": 10.0, "min": 9.0, "max": 11.0, "samples": [9.0, 10.0, 11.0]}
    run = {
        "batch": 1, "depth": 0, "repetitions": 3, "prompt_tokens_per_second": spread,
        "decode_tokens_per_second": spread, "ttft_seconds": spread,
        "tpot_seconds": {"mean": 0.1, "p50": 0.1, "p90": 0.1, "p99": 0.1},
        "bytes_per_second": 1e9, "bandwidth_share": 0.5,
    }  # fmt: skip
    streams = {
        "streams": 4, "requests": 12, "tokens_per_second": 200.0, "ttft_seconds": run["tpot_seconds"],
        "tpot_seconds": run["tpot_seconds"],
    }  # fmt: skip
    drafted = {
        "kind": "edit", "tokens": 100, "drafted_tokens": 50, "accepted_tokens": 40, "decode_tokens_per_second": spread,
        "undrafted_tokens_per_second": spread, "speedup": spread,
    }  # fmt: skip
    speed = {
        "device": "cpu", "threads": 2, "dtype": "bfloat16", "load_seconds": 1.0, "weight_bytes_per_token": 10**8,
        "peak_rss_bytes": 10**9, "peak_vram_bytes": None, "first_token_seconds": spread, "runs": [run],
        "streams": [streams], "drafts": {"draft": "lookup", "way": "written", "kinds": [drafted]},
        "relative_to_first": {"prompt_tokens_per_second": 1.0, "decode_tokens_per_second": 1.0},
    }  # fmt: skip
    fidelity = {
        "reference": "google/gemma-2b", "text": "embedded, held-out", "text_sha256": HASH, "windows": 2, "window": 64,
        "tokens": 126, "kl": 0.01, "kl_median": 0.005, "kl_p99": 0.1, "perplexity_16bit": 10.0, "perplexity": 10.5,
        "perplexity_ratio": 1.05, "top1_agreement": 0.95, "rms_probability_difference": 0.02,
        "kl_along": [{"first": 0, "end": 32, "mean": 0.01}, {"first": 32, "end": 63, "mean": 0.02}],
        "kl_histogram": {"log10_first": -6, "log10_last": 1, "counts": [1, 2, 3]}, "arithmetic": "as it runs",
    }  # fmt: skip
    score = {"task": "arc", "metric": "acc", "filter": "none", "value": 0.5, "stderr": 0.1, "higher_is_better": True}
    task = {
        "name": "arc", "suite": "card", "title": "ARC", "setting": "0-shot", "harness": "0.4.13", "bos": True,
        "fewshot": [0], "samples": 10, "samples_of": 20, "metric": "acc", "filter": "none", "value": 0.5, "stderr": 0.1,
        "higher_is_better": True, "scores": [score],
        "published": {"model": "gemma", "setting": "0-shot", "value": 50.0},
    }  # fmt: skip
    model = {
        "name": "artifact", "role": "model", "kind": "4-bit", "model_type": "gemma", "bytes": 10**8, "identity": HASH,
        "speed": speed, "fidelity": fidelity, "tasks": [task],
    }  # fmt: skip
    return json.loads(json.dumps({
        "schema": 1,
        "complete": True,
        "started": "2026-11-26T07:34:23+00:00",
        "settings": {
            "speed": True, "fidelity": True, "prompt_tokens": 512, "new_tokens": 128, "batches": [1], "depths": [0],
            "first_token": True, "streams": [4], "draft": "lookup", "repetitions": 3, "warmup": 1, "threads": 2,
            "device": "cpu", "tasks": ["arc"],
            "task_limit": 5, "confirm_run_unsafe_code": False, "text": "embedded", "window": 64, "windows": 2,
            "reference": "google/gemma-2b", "compare": ["bf16"],
        },
        "environment": {
            "system": "Linux", "processor": "A processor", "logical_processors": 2, "instructions": "AVX2",
            "gpu": "A GPU", "load_average": 0.5, "python": "3.11", "torch": "2.13", "transformers": "5.0",
            "gemma_awq": "1.0",
        },
        "bandwidth_bytes_per_second": 1e10,
        "models": [model, {**model, "name": "bf16", "role": "compare", "kind": "16-bit"}],
        "left_out": [{"model": "nf4", "part": "speed", "reason": "It is not installed.", "hint": "Install it."}],
    }))  # fmt: skip


def leaves(value: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Every value that holds no others, and where it is."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*place, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from leaves(item, (*place, index))
    else:
        yield place, value


def places(value: Any, place: Place = ()) -> Iterator[Place]:
    """Every value below this one, holding others or not."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*place, key)
        yield from places(item, (*place, key))


def planted(document: Any, place: Place, value: Any) -> Any:
    """A copy with `value` at a place. It shares with `document` what does not hold that place."""
    changed = copy.copy(document)
    key, *below = place
    changed[key] = planted(document[key], tuple(below), value) if below else value
    return changed
