"""The verb `quantize`: a 16-bit Gemma checkpoint to a 4-bit artifact whose fidelity was measured on the way.

Layer by layer: the calibration rows run through the 16-bit layer while its inputs are observed; the layer is
quantized, its folds are proved, its tensors are written; a few held-out rows run through both the 16-bit and the
quantized layers, so that at the end the two models' predictions can be compared.
"""

import hashlib
import platform
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_awq_cli import __version__
from gemma_awq_cli.awq.fidelity import Fidelity, compare
from gemma_awq_cli.awq.precision import matmul_precision
from gemma_awq_cli.calibration import Rows
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.layer_quantizing import (
    GroupReport,
    Heads,
    Observer,
    QuantizedLayer,
    fold_deviation,
    quantize_layer,
    require_exact_fold,
)
from gemma_awq_cli.models.checkpoint import CONFIG, Checkpoint, read_tensors, require_finite
from gemma_awq_cli.models.source import Source
from gemma_awq_cli.models.stack import TextStack
from gemma_awq_cli.models.verifying import verify_artifact
from gemma_awq_cli.models.writing import REPORT, StagedFolder, TensorWriter, require_space, write_errors, write_json
from gemma_awq_cli.planning import DTYPE_NAMES, Plan

HELDOUT_SAMPLES = 6
TOKENS_PER_BATCH = 4096
REPORT_SCHEMA = 1

# Files of the source that belong to the model's text side and its licence; weights and configs are written anew.
COPIED = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "generation_config.json",
    "processor_config.json", "preprocessor_config.json", "LICENSE*", "NOTICE*", "Notice*", "*TERMS*", "USE_POLICY*",
)  # fmt: skip


@dataclass(frozen=True)
class LayerDone:
    """Progress: layer `index` of `layers` is written."""

    index: int
    layers: int
    error: float
    rtn_error: float
    seconds: float


@dataclass(frozen=True)
class Quantized:
    """The result: where the artifact is, and the report that lies in it."""

    folder: Path
    report: dict[str, Any]


def require_quantizable(checkpoint: Checkpoint) -> None:
    """An error for a checkpoint that is quantized already or that this method does not cover."""
    if checkpoint.quantization is not None:
        method = checkpoint.quantization.get("quant_method", "an unknown method")
        raise GemmaAwqError(
            f"{checkpoint.folder} is quantized already ({method}).", "Give the original 16-bit checkpoint."
        )
    if getattr(checkpoint.text_config, "attention_bias", False):
        raise GemmaAwqError(
            f"{checkpoint.folder} has attention biases, which no released Gemma has.", "This variant is not supported."
        )


@torch.inference_mode()
def quantize(
    source: Source,
    checkpoint: Checkpoint,
    stack: TextStack,
    plan: Plan,
    rows: Rows,
    target: Path,
    arguments: dict[str, Any],
    on_layer: Callable[[LayerDone], None],
    force: bool = False,
) -> Quantized:
    """Quantize `checkpoint` into the folder `target`, which appears only when it is complete."""
    started = time.perf_counter()
    staged = StagedFolder(target, force)
    require_space(target, plan.artifact_bytes + 40_000_000)
    with staged as staging, write_errors(target):
        writer = TensorWriter(staging, plan.tensors)
        hidden = _Hidden(stack, rows)
        groups: list[list[GroupReport]] = []
        for index in range(checkpoint.layers):
            layer_started = time.perf_counter()
            layer = _one_layer(checkpoint, stack, plan, hidden, index)
            for name, tensor in layer.tensors.items():
                writer.write(checkpoint.key(f"model.layers.{index}.{name}"), tensor)
            groups.append(layer.groups)
            seconds = time.perf_counter() - layer_started
            on_layer(LayerDone(index, checkpoint.layers, layer.error, layer.rtn_error, seconds))
        fidelity = _measure(stack, hidden, rows)
        _write_unquantized(checkpoint, stack, plan, writer)
        writer.finish()
        copy_side_files(checkpoint, staging)
        write_json(staging / CONFIG, artifact_config(checkpoint, plan))
        verified = verify_artifact(staging)
        report = _report(source, checkpoint, plan, rows, arguments, groups, fidelity, verified, started)
        write_json(staging / REPORT, report)
    return Quantized(target, report)


class _Hidden:
    """The rows' hidden states between two layers, float32 on the CPU.

    calibration, heldout: [R, S, hidden] on the 16-bit path; quantized: the held-out rows on the quantized path.
    """

    def __init__(self, stack: TextStack, rows: Rows) -> None:
        self.calibration = stack.embed(rows.ids)
        self.heldout = stack.embed(rows.heldout)
        self.quantized = self.heldout.clone()


def _one_layer(checkpoint: Checkpoint, stack: TextStack, plan: Plan, hidden: _Hidden, index: int) -> QuantizedLayer:
    weights = {name: tensor.to(plan.dtype) for name, tensor in stack.read_layer(index).items()}
    module = stack.layer(index, weights)
    sample = hidden.calibration[:1].to(stack.device, copy=True)  # the rows themselves advance in place
    with matmul_precision("highest"):
        expected = stack.run_layer(index, module, sample)
    with matmul_precision("medium"):
        observer = Observer(checkpoint.family, module, plan.group_size, stack.device)
        _advance(stack, index, module, hidden.calibration)
        statistics = observer.finish()
        _advance(stack, index, module, hidden.heldout)
    heads = Heads.of(stack.config)
    layer = quantize_layer(checkpoint.family, weights, statistics, heads, plan.group_size, stack.device)
    with matmul_precision("highest"):
        folded = stack.run_layer(index, stack.layer(index, layer.folded), sample)
        require_exact_fold(index, fold_deviation(expected, folded, sample))
    with matmul_precision("medium"):
        _advance(stack, index, stack.layer(index, layer.dense), hidden.quantized)
    return layer


def _advance(stack: TextStack, index: int, module: torch.nn.Module, hidden: Tensor) -> None:
    """Run rows [R, S, hidden] through a layer in place, a batch at a time."""
    for batch in hidden.split(max(1, TOKENS_PER_BATCH // hidden.shape[1])):
        batch.copy_(stack.run_layer(index, module, batch.to(stack.device)))


def _measure(stack: TextStack, hidden: _Hidden, rows: Rows) -> Fidelity:
    """Compare both paths' predictions of every next token of the held-out rows."""
    norm, head = stack.head()
    reference, quantized = (
        norm(path[:, :-1].reshape(-1, path.shape[-1]).to(stack.device)) for path in (hidden.heldout, hidden.quantized)
    )
    targets = rows.heldout[:, 1:].reshape(-1).to(stack.device)
    with matmul_precision("medium"):
        both = zip(stack.logit_chunks(head, reference), stack.logit_chunks(head, quantized), strict=True)
        return compare(both, targets)


def _write_unquantized(checkpoint: Checkpoint, stack: TextStack, plan: Plan, writer: TensorWriter) -> None:
    """Embedding, final norm, an untied head, and the companions: all that no layer holds."""
    for name in (n for n in stack.shapes if not n.startswith("model.layers.")):
        writer.write(checkpoint.key(name), checkpoint.read([name])[name].to(plan.dtype))
    for key in checkpoint.companions():
        tensor = read_tensors(checkpoint.tensors, [key])[key]
        require_finite(key, tensor)
        writer.write(key, tensor)


def copy_side_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy tokenizer, chat template, generation config, processor and licence files into an artifact."""
    for pattern in COPIED:
        for path in checkpoint.folder.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


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
    return config


def _report(
    source: Source,
    checkpoint: Checkpoint,
    plan: Plan,
    rows: Rows,
    arguments: dict[str, Any],
    groups: list[list[GroupReport]],
    fidelity: Fidelity,
    verified: dict[str, Any],
    started: float,
) -> dict[str, Any]:
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
        "layers": [[asdict(group) for group in layer] for layer in groups],
        "versions": {
            "gemma_awq": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "safetensors": safetensors.__version__,
            "python": platform.python_version(),
        },
        "run": {
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - started, 1),
            "peak_memory_bytes": peak_memory(),
            "peak_vram_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
            "machine": f"{platform.system()} {platform.machine()}",
            "threads": torch.get_num_threads(),
        },
    }


def peak_memory() -> int | None:
    """This process's largest resident set in bytes, where the system tells."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
