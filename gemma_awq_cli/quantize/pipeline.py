"""The verb `quantize`: a 16-bit Gemma checkpoint to a 4-bit artifact whose fidelity was measured on the way.

Layer by layer: the calibration rows run through the 16-bit layer while its inputs are observed; the layer is
quantized, its folds are proved, its tensors are written; a few held-out rows run through both the 16-bit and the
quantized layers, so that at the end the two models' predictions can be compared. A journal says which layers are done.
"""

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gemma_awq_cli import __version__
from gemma_awq_cli.awq.precision import matmul_precision
from gemma_awq_cli.calibration_text.rows import Rows
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.fidelity.metrics import Fidelity, compare
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.companions import require_companions
from gemma_awq_cli.models.checkpoints.files import CONFIG, read_json
from gemma_awq_cli.models.checkpoints.journal import ANEW, JOURNAL, Fingerprint, Journal, require_same
from gemma_awq_cli.models.checkpoints.quantization_config import ORIGINAL, describe
from gemma_awq_cli.models.checkpoints.side_files import copy_side_files, side_files
from gemma_awq_cli.models.checkpoints.source import Source
from gemma_awq_cli.models.checkpoints.source_metadata import source_card
from gemma_awq_cli.models.checkpoints.staging import REPORT, StagedFolder, require_space, write_errors
from gemma_awq_cli.models.checkpoints.weight_files import read_tensors, require_finite
from gemma_awq_cli.models.checkpoints.writing import TensorWriter, write_json
from gemma_awq_cli.models.forward.hidden_states import HiddenStates
from gemma_awq_cli.models.forward.layerwise import TextStack
from gemma_awq_cli.models.forward.memory import is_refusal
from gemma_awq_cli.models.forward.verification import verify_artifact
from gemma_awq_cli.models.gemma.text_config import require_loadable
from gemma_awq_cli.quantize.input_statistics import Observer, bfloat16_products, multiplies_bfloat16
from gemma_awq_cli.quantize.layer import (
    Heads,
    QuantizedLayer,
    dense_weights,
    fold_deviation,
    folded_weights,
    quantize_layer,
    require_exact_fold,
)
from gemma_awq_cli.quantize.plan import DTYPE_NAMES, Plan
from gemma_awq_cli.quantize.report import artifact_config, make_report
from gemma_awq_cli.reports.stored_documents import read_quantization_report

HELDOUT_SAMPLES = 6
HELDOUT_SAMPLES_FAST = 2  # they run through every layer twice


@dataclass(frozen=True)
class LayerDone:
    """Progress: layer `index` of `layers` is written. resumed: by an earlier run."""

    index: int
    layers: int
    error: float
    rtn_error: float
    seconds: float
    resumed: bool = False


@dataclass(frozen=True)
class Quantized:
    """The result: where the artifact is, and the report that lies in it. found: it was whole before."""

    folder: Path
    report: dict[str, Any]
    found: bool = False


def require_quantizable(checkpoint: Checkpoint) -> None:
    """An error for a checkpoint that is quantized already or that this method does not cover."""
    if checkpoint.quantization is not None:
        method = describe(checkpoint.quantization)
        raise GemmaAwqError(f"{checkpoint.folder} is quantized already ({method}).", ORIGINAL)
    if getattr(checkpoint.facts, "attention_bias", False):
        raise GemmaAwqError(
            f"{checkpoint.folder} has attention biases, which no released Gemma has.", "This variant is not supported."
        )
    require_companions(checkpoint)


def require_free(target: Path, force: bool, resume: bool) -> StagedFolder:
    """The folder to build in; an error if `target` is taken, or holds work that neither flag speaks of. Only looks."""
    staged = StagedFolder(target, force, resume)
    if not force:
        with write_errors(target):
            _require_asked(staged, Journal(staged.state), resume)
    return staged


def _require_asked(staged: StagedFolder, journal: Journal, resume: bool) -> None:
    if (done := len(journal.records)) and not resume:
        if staged.is_being_written():
            raise GemmaAwqError(f"Another process is writing {staged.target}.", f"Wait for it, or {staged.elsewhere}.")
        raise GemmaAwqError(
            f"An earlier run was interrupted after {done} layers; they are kept in {staged.path}.",
            "Go on with --resume, or begin anew with --force.",
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
    resume: bool = False,
) -> Quantized:
    """Quantize `checkpoint` into the folder `target`, which appears only when it is complete.

    An interrupted run keeps its finished layers; `resume` goes on after them, or returns the artifact if it is whole.
    """
    started = time.perf_counter()
    require_loadable(artifact_config(checkpoint, plan), checkpoint.folder / CONFIG)
    beside, card = side_files(checkpoint.folder), source_card(checkpoint.folder)  # what is wrong there is said now
    fingerprint = make_fingerprint(checkpoint, stack, plan, rows, arguments)
    staged = require_free(target, force, resume)
    staged.keeps_earlier = True  # until it is clear, under the lock, what is there
    with write_errors(target), staged:
        staged.keep = (staged.state / JOURNAL).exists()
        if resume and (found := _found(target, fingerprint, force)) is not None:
            staged.abandon()
            return found
        journal = _journal(staged, fingerprint, checkpoint.layers, force, resume)
        staged.keep = bool(journal.records)
        kept = staged.size() if journal.records else 0
        require_space(target, plan.artifact_bytes + plan.state_bytes + 40_000_000 - kept)
        writer = TensorWriter(staged.folder, plan.tensors, begun=bool(journal.records))
        hidden = HiddenStates(
            staged.state,
            len(rows.ids),
            len(rows.heldout),
            rows.ids.shape[1],
            int(stack.config.hidden_size),
            both=plan.effort.paths == 2,
        )
        if journal.records:
            hidden.require_begun(len(journal.records), checkpoint.layers)
        else:
            ids = torch.cat([rows.ids, rows.heldout])
            hidden.start(ids, stack.embedder(ids))
            journal.begin(fingerprint)
        for index in range(checkpoint.layers):
            if index < len(journal.records):
                writer.keep(_layer_tensors(checkpoint, plan, index))
                on_layer(LayerDone(layers=checkpoint.layers, resumed=True, **_summary(index, journal.records[index])))
                continue
            layer_started = time.perf_counter()
            with _memory_errors(plan, index):
                layer = _one_layer(checkpoint, stack, plan, hidden, index)
            for name, tensor in layer.tensors.items():
                writer.write(checkpoint.artifact_key(f"model.layers.{index}.{name}"), tensor)
            writer.sync()
            hidden.sync(index + 1)
            seconds = round(time.perf_counter() - layer_started, 2)
            journal.add({"groups": [asdict(group) for group in layer.groups], "seconds": seconds})
            staged.keep = True
            on_layer(LayerDone(layers=checkpoint.layers, **_summary(index, journal.records[index])))
            del layer
        staged.keep = True
        with _memory_errors(plan, checkpoint.layers):
            fidelity = _measure(stack, hidden, rows)
        _write_unquantized(checkpoint, stack, plan, writer)
        writer.finish()
        copy_side_files(beside, staged.folder)
        write_json(staged.folder / CONFIG, artifact_config(checkpoint, plan))
        verified = verify_artifact(staged.folder)
        run = {
            "seconds": round(time.perf_counter() - started, 1),
            "seconds_a_layer": [record["seconds"] for record in journal.records],
        }
        layers = [record["groups"] for record in journal.records]
        report = make_report(
            source, checkpoint, plan, rows, arguments, layers, fidelity, verified, fingerprint, run, card
        )
        write_json(staged.folder / REPORT, report)
    return Quantized(target, report)


def _journal(staged: StagedFolder, fingerprint: Fingerprint, layers: int, force: bool, resume: bool) -> Journal:
    """The journal of the layers that are gone on with; an empty one, and nothing else there, for a new beginning."""
    if force and not resume:
        staged.begin_anew()
        return Journal(staged.state)
    try:
        journal = Journal(staged.state)
        _require_asked(staged, journal, resume)
        journal.require_at_most(layers)
        goes_on = bool(journal.records) and _same(journal.fingerprint, fingerprint, staged.path, force)
    except GemmaAwqError:
        if not force:
            raise
        goes_on = False
    if not goes_on:
        staged.begin_anew()
        journal = Journal(staged.state)
    return journal


def make_fingerprint(
    checkpoint: Checkpoint, stack: TextStack, plan: Plan, rows: Rows, arguments: dict[str, Any]
) -> Fingerprint:
    """All that an artifact's bytes depend on, by names that a user understands: sums repeat only if all of it does."""
    import transformers

    device = stack.device
    return {
        "gemma-awq": __version__,
        "model": checkpoint.identity(),
        **arguments,
        "stored dtype": DTYPE_NAMES[plan.dtype],
        "calibration rows": rows.text_sha256,
        "held-out rows": rows.heldout_sha256,
        "tokens a batch": plan.fit.tokens_per_batch,
        "widest Gram matrix": plan.fit.gram_limit,
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "observed in": "bfloat16" if multiplies_bfloat16(device) else "float32",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _same(then: Fingerprint | None, now: Fingerprint, where: Path, force: bool) -> bool:
    """Whether a run may be gone on with. If not, that is an error, unless the user allows to begin anew."""
    if then != now and not force:
        require_same(then or {}, now, where)
    return then == now


def _found(target: Path, fingerprint: Fingerprint, force: bool) -> Quantized | None:
    """What a resumed run finds finished."""
    path = target / REPORT
    if not path.is_file():
        return None
    try:
        then = read_json(path, ANEW).get("fingerprint")
        report = read_quantization_report(target, ANEW)
    except GemmaAwqError:
        if not force:
            raise
        return None
    same = _same(then if isinstance(then, dict) else None, fingerprint, target, force)
    return Quantized(target, report, found=True) if same else None


def _layer_tensors(checkpoint: Checkpoint, plan: Plan, index: int) -> list[str]:
    prefix = checkpoint.artifact_key(f"model.layers.{index}.")
    return [tensor.name for tensor in plan.tensors if tensor.name.startswith(prefix)]


def _summary(index: int, record: dict[str, Any]) -> dict[str, Any]:
    groups = record["groups"]
    sums = {name: sum(group[name] for group in groups) for name in ("error", "rtn_error")}
    return {"index": index, "seconds": record["seconds"], **sums}


@contextmanager
def _memory_errors(plan: Plan, index: int) -> Iterator[None]:
    """Turn the allocators' refusals into an error that names a smaller setting."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_refusal(error):
            raise
        smaller = f"Give --max-memory {plan.smaller / 1e9:.1f}GB" if plan.smaller else "Close other programs"
        raise GemmaAwqError(
            f"Out of memory in layer {index + 1} (planned: {plan.memory_bytes / 1e9:.1f} GB).",
            f"{smaller}, or use fewer tokens a row (--seq-len) or another machine.",
        ) from None


def _one_layer(
    checkpoint: Checkpoint, stack: TextStack, plan: Plan, hidden: HiddenStates, index: int
) -> QuantizedLayer:
    weights = {name: tensor.to(plan.dtype) for name, tensor in stack.read_layer(index).items()}
    batch, paths = plan.rows_per_batch, plan.effort.paths
    sample = hidden.read(index, slice(0, 1)).to(stack.device)

    def through(module: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda states: stack.run_layer(index, module, states.to(stack.device)).float()

    module = stack.layer(index, weights)
    with matmul_precision("highest"):
        expected = stack.run_layer(index, module, sample)
    with matmul_precision("medium"):
        observer = Observer(checkpoint.family, module, plan.group_size, plan.fit.gram_limit, stack.device, paths == 2)
        beside = hidden.disturbed if paths == 2 else None
        with bfloat16_products(stack.device):
            hidden.advance(index, hidden.calibration, max(1, batch // paths), through(module), beside)
        statistics = observer.finish(index)
        hidden.advance(index, hidden.heldout, batch, through(module))
    del module, observer
    layer = quantize_layer(
        checkpoint.family, weights, statistics, Heads.of(stack.config), plan.group_size, stack.device, plan.effort
    )
    module = stack.layer(index, folded_weights(layer, weights, stack.device))
    with matmul_precision("highest"):
        require_exact_fold(index, fold_deviation(expected, stack.run_layer(index, module, sample), sample))
    del module
    module = stack.layer(index, dense_weights(layer, stack.device))
    with matmul_precision("medium"):
        hidden.advance(index, hidden.quantized, batch, through(module))
        if index + 1 < checkpoint.layers:  # nobody reads what leaves the last layer
            with bfloat16_products(stack.device):
                hidden.advance(index, hidden.disturbed, batch, through(module))
    return layer


def _measure(stack: TextStack, hidden: HiddenStates, rows: Rows) -> Fidelity:
    """Compare both paths' predictions of every next token of the held-out rows."""
    norm, head = stack.head()
    layers = stack.checkpoint.layers
    reference, quantized = (
        norm(states[:, :-1].reshape(-1, states.shape[-1]).to(stack.device))
        for states in (hidden.read(layers, hidden.heldout), hidden.read(layers, hidden.quantized))
    )
    targets = rows.heldout[:, 1:].reshape(-1).to(stack.device)
    with matmul_precision("medium"):
        both = zip(stack.logit_chunks(head, reference), stack.logit_chunks(head, quantized), strict=True)
        return compare(both, targets).summary()


def _write_unquantized(checkpoint: Checkpoint, stack: TextStack, plan: Plan, writer: TensorWriter) -> None:
    """Embedding, final norm, an untied head, and the companions: all that no layer holds."""
    for name in (n for n in stack.shapes if not n.startswith("model.layers.")):
        writer.write(checkpoint.artifact_key(name), checkpoint.read([name])[name].to(plan.dtype))
    for key in checkpoint.companions():
        tensor = read_tensors(checkpoint.tensors, [key])[key]
        require_finite(key, tensor)
        writer.write(key, tensor)
