"""The verb `quantize`: from a 16-bit Gemma checkpoint to a 4-bit artifact whose fidelity was measured on the way.

It works layer by layer. The calibration rows run through the 16-bit layer while the inputs of its linears are observed;
the layer is quantized, its folds are proved, its tensors are written. A few held-out rows run through both the 16-bit
layers and the quantized ones, so that the predictions of the two models can be compared at the end. A journal records
the layers that are done.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch

from gemma_awq_cli.awq.precision import matmul_precision
from gemma_awq_cli.errors import UsageError
from gemma_awq_cli.events import Note, Warned
from gemma_awq_cli.fidelity.metrics import Fidelity, compare
from gemma_awq_cli.models.checkpoints.cache import remember_artifact
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.files import CONFIG
from gemma_awq_cli.models.checkpoints.journal import ExpertsRecord, Journal, LayerRecord
from gemma_awq_cli.models.checkpoints.side_files import copy_side_files
from gemma_awq_cli.models.checkpoints.source import DEMO
from gemma_awq_cli.models.checkpoints.staging import REPORT, require_space, write_errors
from gemma_awq_cli.models.checkpoints.writing import TensorWriter, write_json
from gemma_awq_cli.models.forward.hidden_states import HiddenStates
from gemma_awq_cli.models.forward.layerwise import TextStack
from gemma_awq_cli.models.forward.memory import return_freed_memory
from gemma_awq_cli.models.forward.verification import verify_artifact
from gemma_awq_cli.quantize.events import LayerDone, LayersStarted, OnEvent, ignore
from gemma_awq_cli.quantize.kept_grid import kept_groups
from gemma_awq_cli.quantize.layer_pass import layer_memory_errors, process_layer
from gemma_awq_cli.quantize.plan import Plan
from gemma_awq_cli.quantize.preparation import Prepared, prepare
from gemma_awq_cli.quantize.report import (
    REPORT_SCHEMA,
    ArtifactSection,
    CalibrationSection,
    FidelitySection,
    Report,
    RunSection,
    SourceSection,
    VersionsSection,
    artifact_config,
)
from gemma_awq_cli.quantize.request import QuantizeOptions, QuantizeRequest
from gemma_awq_cli.quantize.work_folder import WorkFolder

SMALL_FILES_BYTES = 40_000_000  # tokenizer, config and report of an artifact, at most


@dataclass(frozen=True)
class QuantizedModel:
    """The artifact's folder, and the report that lies in it. found: whether the artifact was complete already."""

    folder: Path
    report: dict[str, Any]
    found: bool = False


@dataclass(frozen=True)
class PlannedModel:
    """The folder that an artifact would have, and the plan."""

    folder: Path
    plan: Plan


def quantize_model(
    model: str | os.PathLike[str] | QuantizeRequest = DEMO,
    output: str | os.PathLike[str] | None = None,
    *,
    on_event: OnEvent = ignore,
    **options: Unpack[QuantizeOptions],
) -> QuantizedModel:
    """Quantize a 16-bit Gemma to a 4-bit AWQ artifact, and return its folder and its report.

    model: a checkpoint folder, a hub id or `demo`; output: the artifact's folder, by default `NAME-AWQ` in the current
    one; options: the other fields of `QuantizeRequest`, such as `quality="best"`. A whole QuantizeRequest in place of
    the model has all of them. on_event: called with the events of `quantize.events`.

    The folder appears only when the artifact is complete. After an error or an interruption the finished layers are
    kept, and the same call with `resume=True` continues after them.

    Raises UsageError for an invalid request, and GemmaAwqError if it cannot be carried out.
    """
    request = _as_request(model, output, options)
    result = _quantize(prepare(request, on_event), request, on_event)
    if (failure := remember_artifact(result.folder)) is not None:
        on_event(Warned(f"{failure}: give `gemma-awq run` the folder with -m."))
    return result


def plan_model(
    model: str | os.PathLike[str] | QuantizeRequest = DEMO,
    output: str | os.PathLike[str] | None = None,
    *,
    on_event: OnEvent = ignore,
    **options: Unpack[QuantizeOptions],
) -> PlannedModel:
    """Return what `quantize_model` would do with the same arguments, without doing it: sizes, memory and time."""
    prepared = prepare(_as_request(model, output, options), on_event, dry_run=True)
    return PlannedModel(prepared.target, prepared.plan)


def _as_request(
    model: str | os.PathLike[str] | QuantizeRequest, output: str | os.PathLike[str] | None, options: QuantizeOptions
) -> QuantizeRequest:
    if not isinstance(model, QuantizeRequest):
        return QuantizeRequest(os.fspath(model), None if output is None else Path(output), **options)
    if output is not None or options:
        raise UsageError("A QuantizeRequest has all options already.", "Use dataclasses.replace to change them.")
    return model


@torch.inference_mode()
def _quantize(prepared: Prepared, request: QuantizeRequest, on_event: OnEvent) -> QuantizedModel:
    """Write the artifact of a prepared request, or find it."""
    started = time.perf_counter()
    target, plan, fingerprint = prepared.target, prepared.plan, prepared.fingerprint()
    with write_errors(target), WorkFolder(target, request.force, request.resume) as work:
        if (found := work.finished_report(fingerprint)) is not None:
            return QuantizedModel(target, found, found=True)
        journal = work.open_journal(fingerprint, plan.layers)
        kept = work.kept_bytes() if journal.records else 0
        require_space(target, plan.artifact_bytes + plan.state_bytes + SMALL_FILES_BYTES - kept)
        writer = TensorWriter(work.model, plan.tensors, begun=bool(journal.records))
        hidden = _hidden_states(prepared, work.state, journal)
        if not journal.records:
            journal.begin(fingerprint)
        _quantize_layers(prepared, writer, hidden, journal, on_event)
        with layer_memory_errors(plan, plan.layers):
            fidelity = _measure(prepared.stack, hidden, prepared.rows.heldout)
        _write_unquantized(prepared.checkpoint, prepared.stack, plan, writer)
        writer.finish()
        copy_side_files(prepared.side_files, work.model)
        write_json(work.model / CONFIG, artifact_config(prepared.checkpoint, plan))
        verified = verify_artifact(work.model)
        report = Report(
            REPORT_SCHEMA,
            SourceSection.of(prepared.source, prepared.checkpoint, plan, prepared.card, prepared.merged),
            ArtifactSection.of(plan),
            prepared.arguments,
            CalibrationSection.of(prepared.rows),
            FidelitySection.of(fidelity, prepared.rows),
            kept_groups(journal.records) if plan.keeps_grid else None,
            verified,
            tuple(record.groups for record in journal.records),
            fingerprint,
            VersionsSection.now(),
            RunSection.now(time.perf_counter() - started, journal.records, prepared.stack.device),
        ).to_json()
        write_json(work.model / REPORT, report)
    return QuantizedModel(target, report)


def _hidden_states(prepared: Prepared, folder: Path, journal: Journal) -> HiddenStates:
    """The hidden states in front of the first layer that is not done."""
    stack, rows, plan = prepared.stack, prepared.rows, prepared.plan
    shape = prepared.checkpoint.shape
    hidden = HiddenStates(folder, shape, rows.ids, rows.heldout, both_paths=plan.effort.paths == 2)
    if journal.records:
        hidden.require_begun(len(journal.records), plan.layers)
    else:
        hidden.start(stack.embedder(torch.cat([rows.ids, rows.heldout])))
    return hidden


def _quantize_layers(
    prepared: Prepared, writer: TensorWriter, hidden: HiddenStates, journal: Journal, on_event: OnEvent
) -> None:
    """Quantize and write every layer that is not in the journal yet."""
    checkpoint, plan = prepared.checkpoint, prepared.plan
    on_event(LayersStarted(plan.layers))
    for index, record in enumerate(journal.records):
        writer.keep(_layer_tensors(checkpoint, plan, index))
        on_event(LayerDone(index, plan.layers, record.error, record.rtn_error, record.seconds, resumed=True))
    for index in range(len(journal.records), plan.layers):
        started = time.perf_counter()
        with layer_memory_errors(plan, index):
            layer = process_layer(checkpoint, prepared.stack, plan, hidden, index)
        for name, tensor in layer.tensors.items():
            writer.write(checkpoint.artifact_key(f"model.layers.{index}.{name}"), tensor)
        writer.sync()
        hidden.sync(index + 1)
        record = LayerRecord(tuple(layer.groups), round(time.perf_counter() - started, 2))
        journal.add(record)
        del layer
        return_freed_memory()
        on_event(LayerDone(index, plan.layers, record.error, record.rtn_error, record.seconds))
    if starved := sum(len(g.starved) for r in journal.records for g in r.groups if isinstance(g, ExpertsRecord)):
        experts = sum(layout.experts.count for layout in plan.layouts if layout.experts is not None)
        on_event(
            Note(
                f"{starved} of {experts} experts got fewer calibration tokens than they have input channels, and were "
                "calibrated on other tokens too. The report names them; a larger --num-samples leaves fewer."
            )
        )


def _layer_tensors(checkpoint: Checkpoint, plan: Plan, index: int) -> list[str]:
    prefix = checkpoint.artifact_key(f"model.layers.{index}.")
    return [tensor.name for tensor in plan.tensors if tensor.name.startswith(prefix)]


def _measure(stack: TextStack, hidden: HiddenStates, heldout: torch.Tensor) -> Fidelity:
    """Compare the predictions of both paths for every next token of the held-out rows [R, S]."""
    norm, head = stack.head()
    layers = stack.checkpoint.layers
    reference, quantized = (
        norm(hidden.read(layers, rows).to(stack.device))[:, :-1].flatten(0, 1)
        for rows in (hidden.heldout, hidden.heldout_quantized)
    )
    targets = heldout[:, 1:].reshape(-1).to(stack.device)
    with matmul_precision("medium"):
        both = zip(stack.logit_chunks(head, reference), stack.logit_chunks(head, quantized), strict=True)
        return compare(both, targets).summary()


def _write_unquantized(checkpoint: Checkpoint, stack: TextStack, plan: Plan, writer: TensorWriter) -> None:
    """Write the tensors outside the layers: embedding, final norm, an untied head, and the companions."""
    for name in (n for n in stack.shapes if not n.startswith("model.layers.")):
        pieces = (piece.to(plan.dtype) for piece in checkpoint.pieces(name))
        writer.write_pieces(checkpoint.artifact_key(name), pieces)
    for key in checkpoint.companions():
        writer.write_pieces(key, checkpoint.stored_pieces(key))
