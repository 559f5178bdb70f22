"""What an artifact says of itself: its config and its report."""

import hashlib
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from gemma_awq_cli import __version__
from gemma_awq_cli.calibration_text.rows import Rows
from gemma_awq_cli.errors import some
from gemma_awq_cli.fidelity.metrics import Fidelity
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.files import CONFIG
from gemma_awq_cli.models.checkpoints.local_paths import without_local_paths
from gemma_awq_cli.models.checkpoints.side_files import not_copied
from gemma_awq_cli.models.checkpoints.source import Source
from gemma_awq_cli.models.checkpoints.source_metadata import UNREADABLE
from gemma_awq_cli.models.checkpoints.tying import with_tie
from gemma_awq_cli.models.forward.memory import peak_memory
from gemma_awq_cli.quantize.plan import DTYPE_NAMES, Plan

REPORT_SCHEMA = 2


def artifact_config(checkpoint: Checkpoint, plan: Plan) -> dict[str, Any]:
    """The source's config with the quantization section that transformers, vLLM and AutoAWQ read."""
    dtype = DTYPE_NAMES[plan.dtype]
    config = {key: value for key, value in checkpoint.raw_config.items() if key != "torch_dtype"}
    config["dtype"] = dtype
    if isinstance(config.get("text_config"), dict):
        text_config = {key: value for key, value in config["text_config"].items() if key != "torch_dtype"}
        config["text_config"] = {**text_config, "dtype": dtype}
    config["quantization_config"] = {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": plan.group_size,
        "zero_point": True,
        "modules_to_not_convert": list(checkpoint.family.not_converted),
    }
    stated: dict[str, Any] = without_local_paths(with_tie(config, checkpoint.tied_head))[0]
    return stated


def source_notes(folder: Path, card: Mapping[str, Any] | None) -> list[str]:
    """What a user should know of the source's files before they are quantized. card: as `source_card` gives it."""
    notes = []
    if left := not_copied(folder):
        notes.append(f"Not copied into the artifact, because they are no known part of a model: {some(left)}")
    if card is not None and UNREADABLE in card:
        notes.append(f"The source's licence is not known: {card[UNREADABLE]} `push` will ask for it.")
    return notes


def make_report(
    source: Source,
    checkpoint: Checkpoint,
    plan: Plan,
    rows: Rows,
    arguments: dict[str, Any],
    layers: list[list[dict[str, Any]]],
    fidelity: Fidelity,
    verified: dict[str, Any],
    fingerprint: dict[str, Any],
    run: dict[str, Any],
    card: dict[str, Any] | None,
) -> dict[str, Any]:
    """The report that lies in the artifact. fingerprint: all that its bytes depend on; run: what this run took; card:
    what the source's own card declares.
    """
    import safetensors
    import transformers

    return {
        "schema": REPORT_SCHEMA,
        "source": {
            "model": source.asked,
            "revision": source.revision,
            "model_type": checkpoint.family.model_type,
            "config_sha256": hashlib.sha256((checkpoint.folder / CONFIG).read_bytes()).hexdigest(),
            "bytes": plan.source_bytes,
            "card": card,
        },
        "artifact": {
            "bytes": plan.artifact_bytes,
            "bits": 4,
            "group_size": plan.group_size,
            "dtype": DTYPE_NAMES[plan.dtype],
            "quantized_linears": plan.quantized_linears,
        },
        "arguments": arguments,
        "calibration": {
            "text": rows.description,
            "rows": rows.ids.shape[0],
            "seq_len": rows.ids.shape[1],
            "sha256": rows.text_sha256,
        },
        "fidelity": {
            "heldout_tokens": fidelity.tokens,
            "heldout_sha256": rows.heldout_sha256,
            "kl": fidelity.kl,
            "perplexity_16bit": fidelity.perplexity_reference,
            "perplexity_4bit": fidelity.perplexity_quantized,
            "top1_agreement": fidelity.top1_agreement,
        },
        "verified": verified,
        "layers": layers,
        "fingerprint": fingerprint,
        "versions": {
            "gemma_awq": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "safetensors": safetensors.__version__,
            "python": platform.python_version(),
        },
        "run": {
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            **run,
            "peak_memory_bytes": peak_memory(),
            "peak_vram_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
            "machine": f"{platform.system()} {platform.machine()}",
            "threads": torch.get_num_threads(),
        },
    }
