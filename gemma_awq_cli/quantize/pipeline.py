"""The verb `quantize`: from a 16-bit Gemma checkpoint to a 4-bit artifact whose fidelity was measured on the way.

It works layer by layer. The calibration rows run through the 16-bit layer while the inputs of its linears are observed;
the layer is quantized, its folds are proved, its tensors are written. A few held-out rows run through both the 16-bit
layers and the quantized ones, so that the predictions of the two models can be compared at the end. A journal records
the layers that are done.
"""

import os
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import torch

from gemma_awq_cli.awq.row_shares import ALONE, RowShares
from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.events import Note, Warned
from gemma_awq_cli.models.checkpoints.cache import remember_artifact
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.journal import ExpertsRecord, Journal, LayerRecord, differences
from gemma_awq_cli.models.checkpoints.source import DEMO
from gemma_awq_cli.models.checkpoints.staging import REPORT, StagedFolder, require_space, write_errors
from gemma_awq_cli.models.checkpoints.writing import TensorWriter, write_json
from gemma_awq_cli.models.forward.hidden_states import HiddenStates
from gemma_awq_cli.models.forward.memory import return_freed_memory, reuse_freed_memory
from gemma_awq_cli.quantize.budget import Costs
from gemma_awq_cli.quantize.events import (
    InformationFinished,
    InformationStarted,
    InformationStep,
    LayerDone,
    LayerMeasured,
    LayersStarted,
    MeasuringStarted,
    OnEvent,
    ignore,
)
from gemma_awq_cli.quantize.finishing import finish_artifact
from gemma_awq_cli.quantize.fold_files import FoldFiles
from gemma_awq_cli.quantize.heldout import measure_heldout
from gemma_awq_cli.quantize.information_files import InformationFiles
from gemma_awq_cli.quantize.information_layout import BATCH_SHARE
from gemma_awq_cli.quantize.kept_grid import kept_groups
from gemma_awq_cli.quantize.layer_files import LayerFiles
from gemma_awq_cli.quantize.layer_pass import layer_memory_errors, pass_heldout, process_layer
from gemma_awq_cli.quantize.output_information import OutputInformation, information_steps
from gemma_awq_cli.quantize.plan import Plan
from gemma_awq_cli.quantize.preparation import Prepared, prepare
from gemma_awq_cli.quantize.processes import (
    Group,
    Launched,
    joined,
    launched,
    own_device,
    require_same_everywhere,
)
from gemma_awq_cli.quantize.report import (
    REPORT_SCHEMA,
    ArtifactSection,
    CalibrationSection,
    FidelitySection,
    Report,
    RowFeedbackSection,
    RunSection,
    SourceSection,
    VersionsSection,
)
from gemma_awq_cli.quantize.request import BUDGET_OPTIONS, QuantizeOptions, QuantizeRequest
from gemma_awq_cli.quantize.row_exchange import exchanging
from gemma_awq_cli.quantize.row_sharing import quantize_own_rows, recording, row_states
from gemma_awq_cli.quantize.sharing import SharedProgress, quantize_share, remove_leftovers, shares_of_layers
from gemma_awq_cli.quantize.statistics_files import StatisticsFiles
from gemma_awq_cli.quantize.trials import TrialFiles
from gemma_awq_cli.quantize.within_budget import plan_within_budget, quantize_within_budget
from gemma_awq_cli.quantize.work_folder import WorkFolder
from gemma_awq_cli.reports.stored_documents import read_quantization_report

COMPLETE = -1  # what the first of several processes says in place of the number of finished layers
SMALL_FILES_BYTES = 40_000_000  # tokenizer, config and report of an artifact, at most


@dataclass(frozen=True)
class QuantizedModel:
    """The artifact's folder, and the report that lies in it. found: whether the artifact was complete already."""

    folder: Path
    report: dict[str, Any]
    found: bool = False


@dataclass(frozen=True)
class PlannedModel:
    """The folder that an artifact would have, and the plan: that of the first try within a budget.

    costs: of all that would be tried.
    """

    folder: Path
    plan: Plan
    costs: Costs | None = None


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
    kept, and the same call with `resume=True` continues after them. Processes that a launcher such as torchrun has
    started work together: all of them call this with the same arguments, and get the same result.

    Raises UsageError for an invalid request, ThresholdError if nothing meets its budget, and GemmaAwqError if it cannot
    be carried out.
    """
    request = _as_request(model, output, options)
    reuse_freed_memory()
    if request.has_budget:
        result = _quantize_in_budget(request, on_event)
    elif (process := launched()) is not None:
        result = _quantize_together(process, request, on_event)
        if not process.is_first:
            return result
    else:
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
    request, process = _as_request(model, output, options), launched()
    if request.has_budget:
        _require_one_process()
        prepared = prepare(request, on_event, dry_run=True)
        return PlannedModel(prepared.target, prepared.plan, plan_within_budget(prepared, request, on_event))
    if process is not None:
        request = replace(request, device=own_device(request.device, process))
    prepared = prepare(request, on_event, dry_run=True, process=process)
    return PlannedModel(prepared.target, prepared.plan)


def _as_request(
    model: str | os.PathLike[str] | QuantizeRequest, output: str | os.PathLike[str] | None, options: QuantizeOptions
) -> QuantizeRequest:
    if not isinstance(model, QuantizeRequest):
        return QuantizeRequest(os.fspath(model), None if output is None else Path(output), **options)
    if output is not None or options:
        raise UsageError("A QuantizeRequest has all options already.", "Use dataclasses.replace to change them.")
    return model


def _quantize_in_budget(request: QuantizeRequest, on_event: OnEvent) -> QuantizedModel:
    """`quantize_model` with a bound that several group sizes are tried for."""
    _require_one_process()
    prepared = prepare(request, on_event)

    def quantize(
        prepared: Prepared, request: QuantizeRequest, trials: TrialFiles, statistics: StatisticsFiles | None
    ) -> dict[str, Any]:
        return _quantize(prepared, request, on_event, trials=trials, statistics=statistics).report

    with torch.inference_mode():
        report, found = quantize_within_budget(prepared, request, quantize, on_event)
    return QuantizedModel(prepared.target, report, found)


def _require_one_process() -> None:
    if launched() is not None:
        raise UsageError(f"{BUDGET_OPTIONS} is not for several processes.", "Start one process.")


def _quantize_together(process: Launched, request: QuantizeRequest, on_event: OnEvent) -> QuantizedModel:
    """`quantize_model` in one of several processes. The first of them reports, and writes the artifact."""
    request = replace(request, device=own_device(request.device, process))
    report = on_event if process.is_first else ignore
    with joined(process) as group:
        prepared = _prepare_together(group, request, report)
        require_same_everywhere(group.gather(prepared.fingerprint()), differences)
        if group.is_first:
            result = _quantize(prepared, request, report, group)
            with suppress(GemmaAwqError):  # the artifact is in its place: who is lost now is not missed
                group.wait()
            return result
        done = group.gather(0)[0]
        if done == COMPLETE:
            group.wait()
            return QuantizedModel(prepared.target, _report_of(prepared.target), found=True)
        with write_errors(prepared.target), torch.inference_mode():
            state = StagedFolder.state_of(prepared.target)
            if prepared.plan.shares_rows:
                with exchanging(group) as shares:
                    quantize_own_rows(prepared, state, done, shares)
            else:
                _share_out(prepared, LayerFiles(state), state, group)
        group.wait()
        return QuantizedModel(prepared.target, _report_of(prepared.target))


def _prepare_together(group: Group, request: QuantizeRequest, report: OnEvent) -> Prepared:
    """`prepare` in one of several processes. The first one fetches the model for all that share its cache.

    It also samples the rows that the model writes itself, and hands them to the others.
    """
    if group.is_first:
        prepared = prepare(request, report, process=group.process)
        count = 0 if prepared.plan.keeps_grid else request.own_rows.rows
        group.gather(prepared.rows.ids[len(prepared.rows.ids) - count :].tolist())
        return prepared
    sampled = torch.tensor(group.gather([])[0], dtype=torch.int64)
    return prepare(request, report, process=group.process, sampled=sampled)


def _report_of(folder: Path) -> dict[str, Any]:
    return read_quantization_report(folder, "Look at the messages of the other processes.")


@torch.inference_mode()
def _quantize(
    prepared: Prepared,
    request: QuantizeRequest,
    on_event: OnEvent,
    group: Group | None = None,
    trials: TrialFiles | None = None,
    statistics: StatisticsFiles | None = None,
) -> QuantizedModel:
    """Write the artifact of a prepared request, or find it.

    group: of several processes, whose first one this is; trials: those that the artifact is one of; statistics: which
    they share.
    """
    started = time.perf_counter()
    target, plan, fingerprint = prepared.target, prepared.plan, prepared.fingerprint()
    with write_errors(target), WorkFolder(target, request.force, request.resume) as work:
        found = work.finished_report(fingerprint)
        if found is not None:
            if group is not None:
                group.gather(COMPLETE)
            return QuantizedModel(target, found, found=True)
        journal = work.open_journal(fingerprint, plan.layers)
        kept = work.kept_bytes() if journal.records else 0
        require_space(target, plan.artifact_bytes + plan.state_bytes + SMALL_FILES_BYTES - kept)
        writer = TensorWriter(work.model, plan.tensors, begun=bool(journal.records))
        information = InformationFiles(work.state if trials is None else trials.folder)
        folds = None if trials is None else trials.folds(plan.group_size)
        if not journal.records:
            journal.begin(fingerprint)
            if plan.feedback_tokens:
                measure_information(prepared, information, on_event)
        if group is not None:
            if not plan.shares_rows:
                work.layer_files.begin()
                remove_leftovers(work.state)
            group.gather(len(journal.records))
        with (
            exchanging(group) if group is not None and plan.shares_rows else nullcontext(ALONE) as shares,
            row_states(
                prepared, work.state, len(journal.records), shares, statistics is None or not statistics.found
            ) as hidden,
        ):
            if work.layer_files.begun:  # by this run or by one that it continues
                on_event(LayersStarted(plan.layers))
                progress = SharedProgress(work.layer_files, plan, on_event)
                _share_out(prepared, work.layer_files, work.state, group, progress)
                _collect_layers(prepared, work.layer_files, writer, hidden, journal, on_event)
            else:
                _quantize_layers(prepared, writer, hidden, information, journal, folds, statistics, shares, on_event)
        with layer_memory_errors(plan, plan.layers):
            fidelity = measure_heldout(prepared.stack, hidden, prepared.rows.heldout)
        verified = finish_artifact(prepared, writer, work.model)
        report = Report(
            REPORT_SCHEMA,
            SourceSection.of(prepared.source, prepared.checkpoint, plan, prepared.card, prepared.merged),
            ArtifactSection.of(plan),
            prepared.arguments,
            CalibrationSection.of(prepared.rows),
            RowFeedbackSection.of(plan),
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


def measure_information(prepared: Prepared, files: InformationFiles, on_event: OnEvent) -> None:
    """Measure the information of all linears' outputs, as far as an interrupted run has not."""
    plan, rows, seed = prepared.plan, prepared.rows, int(prepared.arguments["seed"])
    tokens = plan.fit.tokens_per_batch // BATCH_SHARE
    measured = OutputInformation(prepared.stack, files, rows.ids, tokens, seed)
    if any(layout.experts is not None for layout in plan.layouts):
        on_event(
            Note("The rows of experts are rounded alone: one expert gets too few tokens for feedback between them.")
        )
    if left := measured.steps_left:
        on_event(InformationStarted(information_steps(plan.layers), left))
        with layer_memory_errors(plan, 0):
            measured.measure(lambda: on_event(InformationStep()))
        on_event(InformationFinished())


def _quantize_layers(
    prepared: Prepared,
    writer: TensorWriter,
    hidden: HiddenStates,
    information: InformationFiles,
    journal: Journal,
    folds: FoldFiles | None,
    statistics: StatisticsFiles | None,
    shares: RowShares,
    on_event: OnEvent,
) -> None:
    """Quantize and write every layer that is not in the journal yet.

    folds: where its factors are kept, if anywhere; statistics: see `process_layer`; shares: of the first of several
    processes, or of the only one.
    """
    checkpoint, plan = prepared.checkpoint, prepared.plan
    if folds is not None:
        folds.begin()
    on_event(LayersStarted(plan.layers))
    for index, record in enumerate(journal.records):
        writer.keep(_layer_tensors(checkpoint, plan, index))
        on_event(LayerDone(index, plan.layers, record.error, record.rtn_error, record.seconds, resumed=True))
    for index in range(len(journal.records), plan.layers):
        started = time.perf_counter()
        with layer_memory_errors(plan, index):
            layer = process_layer(checkpoint, prepared.stack, plan, hidden, information, index, shares, statistics)
        _write_layer(checkpoint, writer, hidden, index, layer.tensors)
        if folds is not None:
            folds.add(index, plan.layouts[index], layer)
        record = LayerRecord(tuple(layer.groups), round(time.perf_counter() - started, 2))
        with recording(shares):
            journal.add(record)
        del layer
        return_freed_memory()
        on_event(LayerDone(index, plan.layers, record.error, record.rtn_error, record.seconds))
    _note_starved(plan, journal, on_event)


def _write_layer(
    checkpoint: Checkpoint, writer: TensorWriter, hidden: HiddenStates, index: int, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Write a layer's tensors, and make sure that they and the hidden states behind it are on the disk."""
    for name, tensor in tensors.items():
        writer.write(checkpoint.artifact_key(f"model.layers.{index}.{name}"), tensor)
    writer.sync()
    hidden.sync(index + 1)


def _share_out(
    prepared: Prepared,
    files: LayerFiles,
    state: Path,
    group: Group | None,
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    """Quantize this process's share of the missing layers, and return when every layer has its file.

    group: None for the only process, which continues the work of several. meanwhile: called after each layer, and while
    the others work.
    """
    layers, number = prepared.plan.layers, 0 if group is None else group.process.rank
    finished = files.finished() if group is None else group.gather(files.finished())[0]  # which others add to already
    missing = [index for index in range(layers) if index not in finished]
    own = shares_of_layers(missing, number, 1 if group is None else group.process.count)
    try:
        quantize_share(prepared, files, state, own, meanwhile)
        if group is not None:
            group.wait(meanwhile)
    finally:
        meanwhile()  # also after an interruption: what is kept by then is said


def _collect_layers(
    prepared: Prepared,
    files: LayerFiles,
    writer: TensorWriter,
    hidden: HiddenStates,
    journal: Journal,
    on_event: OnEvent,
) -> None:
    """Write the layers that all processes have finished into the artifact, and take the held-out rows through them."""
    checkpoint, plan = prepared.checkpoint, prepared.plan
    on_event(MeasuringStarted(plan.layers))
    for index in range(plan.layers):
        if index < len(journal.records):
            writer.keep(_layer_tensors(checkpoint, plan, index))
        else:
            tensors, record = files.read(index)
            with layer_memory_errors(plan, index):
                pass_heldout(prepared.stack, plan, hidden, index, tensors)
            _write_layer(checkpoint, writer, hidden, index, tensors)
            journal.add(record)
            return_freed_memory()
        on_event(LayerMeasured())
    _note_starved(plan, journal, on_event)


def _note_starved(plan: Plan, journal: Journal, on_event: OnEvent) -> None:
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
