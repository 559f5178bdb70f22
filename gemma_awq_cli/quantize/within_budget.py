"""Quantizing within a budget: several group sizes, and linears that stay in 16 bits, until a bound is met.

Each group size that is tried becomes an artifact beside the unfinished one, made like any other. Linears are put back
in 16 bits without quantizing again. The one that is chosen becomes the artifact; the others go with the rest of
the unfinished work. If none meets the bound, all of them stay, so that another bound can be tried at once.
"""

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.events import Note
from gemma_awq_cli.fidelity.metrics import Fidelity
from gemma_awq_cli.models.checkpoints.journal import Fingerprint
from gemma_awq_cli.models.checkpoints.staging import REPORT, free_space, require_space, write_errors
from gemma_awq_cli.models.checkpoints.writing import TensorWriter, write_json
from gemma_awq_cli.models.gemma.left_groups import LeftGroup, leavable_groups
from gemma_awq_cli.quantize.budget import MOST_IN_16_BITS, Budget, BudgetSearch, Choice, Costs, Trial, fitting_sizes
from gemma_awq_cli.quantize.events import ComparingStarted, ComparingStep, OnEvent, TrialMeasured, TrialStarted
from gemma_awq_cli.quantize.finishing import finish_artifact
from gemma_awq_cli.quantize.layer import LEFT
from gemma_awq_cli.quantize.mixture import Mixture
from gemma_awq_cli.quantize.plan import Plan, fitting_group_sizes, leave_in_16_bits, make_plan
from gemma_awq_cli.quantize.preparation import Prepared
from gemma_awq_cli.quantize.report import ArtifactSection, BudgetSection, FidelitySection
from gemma_awq_cli.quantize.request import QuantizeRequest
from gemma_awq_cli.quantize.sensitivity import measure_sensitivities, sensitivity_steps
from gemma_awq_cli.quantize.statistics_files import StatisticsFiles
from gemma_awq_cli.quantize.trials import OF_ONE_TRIAL, Sensitivities, TrialFiles
from gemma_awq_cli.quantize.work_folder import WorkFolder
from gemma_awq_cli.reports.stored_documents import read_quantization_report
from gemma_awq_cli.system.sizes import format_bytes

# Quantizes a prepared request into an artifact of the trials, or finds it there, and returns the report. The statistics
# are those that the trials share, if they do.
Quantize = Callable[[Prepared, QuantizeRequest, TrialFiles, StatisticsFiles | None], dict[str, Any]]


def plan_within_budget(prepared: Prepared, request: QuantizeRequest, on_event: OnEvent) -> Costs:
    """Say what would be tried, and return what all of it would cost. Raises ThresholdError if nothing is small enough.

    prepared: with any of the group sizes.
    """
    budget = Budget(request.max_kl, request.max_size)
    prepared_sizes = _prepared_sizes(prepared, request)
    costs = _costs(prepared_sizes)
    sizes = _sizes_to_try(budget, costs)
    most = f"up to {MOST_IN_16_BITS:.0%} of the linears' weights in 16 bits"
    listed = ", ".join(f"{size} ({format_bytes(costs.plain[size])})" for size in sizes)
    order = "" if len(sizes) == 1 else ", each as planned, in this order"
    room = "" if budget.max_bytes is None else " if there is room"
    on_event(Note(f"For {budget.describe()}: groups of {listed}{order}, then{room} {most}."))
    disk = _trial_bytes(costs, sizes)
    if _has_room_for_statistics(prepared_sizes, sizes, costs):
        disk += StatisticsFiles.size(prepared.plan)
    on_event(Note(f"What is tried takes up to {format_bytes(disk)} of disk until the choice is made."))
    return costs


def quantize_within_budget(
    prepared: Prepared, request: QuantizeRequest, quantize: Quantize, on_event: OnEvent
) -> tuple[dict[str, Any], bool]:
    """Write the smallest artifact that meets the budget's KL, or the best one that meets its size.

    prepared: with any of the group sizes. Returns the report, and whether the artifact was complete already.
    Raises ThresholdError if nothing meets the budget; what was measured stays then.
    """
    plan_within_budget(prepared, request, on_event)
    sizes = _prepared_sizes(prepared, request)
    target = prepared.target
    with write_errors(target), WorkFolder(target, request.force, request.resume) as work:
        known = next((p for p in sizes.values() if p.plan.group_size == _group_size_at(target)), prepared)
        found = work.finished_report(known.fingerprint())
        if found is not None:
            return found, True
        trials = work.open_trials(_conditions(prepared))
        run = _Run(sizes, request, trials, quantize, on_event)
        try:
            chosen = run.search.run()
        finally:
            shutil.rmtree(run.scratch, ignore_errors=True)
        report = run.finish(chosen, work.model)
        write_json(work.model / REPORT, report)
    return report, False


class _Run:
    """One search: how the choices are made and measured."""

    def __init__(
        self,
        sizes: dict[int, Prepared],
        request: QuantizeRequest,
        trials: TrialFiles,
        quantize: Quantize,
        on_event: OnEvent,
    ) -> None:
        self._sizes, self._trials = sizes, trials
        self._request = replace(request, max_kl=None, max_size=None, resume=True)
        self._quantize, self._on_event = quantize, on_event
        self._reports: dict[int, dict[str, Any]] = {}
        self._sensitivities: Sensitivities | None = None
        self._started = time.perf_counter()
        self.scratch = trials.folder / "scratch"
        budget, costs = Budget(request.max_kl, request.max_size), _costs(sizes)
        self._keeps_statistics = _has_room_for_statistics(sizes, _sizes_to_try(budget, costs), costs)
        self.search = BudgetSearch(budget, costs, self._measure, self._measure_sensitivities)

    def _measure(self, choice: Choice) -> Trial:
        self._on_event(TrialStarted(choice))
        prepared = self._prepared(choice)
        if choice.left:
            kl = self._fidelity(choice).kl
        else:
            own = replace(prepared, target=self._trials.artifact(choice.group_size))
            own = replace(
                own, arguments=self._request.reported(own.stack.device.type, choice.group_size, own.rows.added)
            )
            report = self._quantize(own, self._request, self._trials, self._statistics(own.plan))
            self._reports[choice.group_size] = report
            if all((self._trials.artifact(size) / REPORT).is_file() for size in self._sizes):
                StatisticsFiles.remove(self._trials.folder)  # which may be larger than the model
            kl = report["fidelity"]["kl"]
        trial = Trial(choice, prepared.plan.file_bytes, kl)
        self._on_event(TrialMeasured(trial, self.search.budget.meets_kl(kl)))
        return trial

    def _statistics(self, plan: Plan) -> StatisticsFiles | None:
        """Those that another group size was quantized from, or files for those of this one, if there is room."""
        if not StatisticsFiles.suit(plan):
            return None
        files = StatisticsFiles(self._trials.folder, plan)
        return files if files.found or self._keeps_statistics else None

    def _fidelity(self, choice: Choice) -> Fidelity:
        """What was measured with groups of linears in 16 bits, now or before."""
        if (known := self._trials.mixture(choice)) is None:
            prepared = self._prepared(choice)
            self._begin_steps("Measuring", prepared.plan.layers)
            known = self._mixture(choice).measure(self._scratch(), lambda: self._on_event(ComparingStep()))
            self._trials.add_mixture(choice, known)
        return known

    def _measure_sensitivities(self, group_size: int) -> dict[LeftGroup, float]:
        prepared = self._sizes[group_size]
        known = self._trials.sensitivities(leavable_groups(prepared.plan.layouts))
        if known is None:
            self._begin_steps("Measuring linears", sensitivity_steps(prepared))
            artifact, folds = self._trials.artifact(group_size), self._trials.folds(group_size)
            known = measure_sensitivities(
                prepared, artifact, folds, self._scratch(), lambda: self._on_event(ComparingStep())
            )
            self._trials.add_sensitivities(known)
        self._sensitivities = known
        return dict(known.kl)

    def finish(self, chosen: Trial, folder: Path) -> dict[str, Any]:
        """Put the artifact that was chosen into a folder in place of what is there, and return its report."""
        for left in folder.iterdir():  # by a run that was killed here: some may be other names of a trial's files
            left.unlink()
        choice = chosen.choice
        prepared, base = self._prepared(choice), self._trials.artifact(choice.group_size)
        report = dict(self._reports[choice.group_size])
        if choice.left:
            require_space(folder, prepared.plan.file_bytes)
            writer = TensorWriter(folder, prepared.plan.tensors)
            self._mixture(choice).write(writer)
            report["verified"] = finish_artifact(prepared, writer, folder)
            measured = FidelitySection.of(self._fidelity(choice), prepared.rows)
            report["fidelity"] = asdict(measured)
            report["layers"] = _with_left(report["layers"], choice.left)
        else:
            for path in base.iterdir():
                if path.name != REPORT:  # which the caller writes: not into the trial's own
                    _link(path, folder / path.name)
        report["artifact"] = ArtifactSection.of(prepared.plan).to_json()
        report["arguments"] = prepared.arguments
        report["fingerprint"] = prepared.fingerprint()
        sensitivities = None if self._sensitivities is None else self._sensitivities.to_json()
        report["budget"] = BudgetSection.of(self.search, prepared.plan, sensitivities).to_json()
        report["run"] = {**report["run"], "seconds": round(time.perf_counter() - self._started, 1)}
        return report

    def _prepared(self, choice: Choice) -> Prepared:
        prepared = self._sizes[choice.group_size]
        plan = leave_in_16_bits(prepared.plan, prepared.checkpoint, prepared.stack, choice.left)
        return replace(prepared, plan=plan)

    def _mixture(self, choice: Choice) -> Mixture:
        size = choice.group_size
        return Mixture(self._prepared(choice), self._trials.artifact(size), self._trials.folds(size))

    def _begin_steps(self, what: str, steps: int) -> None:
        self._on_event(ComparingStarted(what, steps))

    def _scratch(self) -> Path:
        if self.scratch.exists():  # of what was measured before, or of a run that was killed
            shutil.rmtree(self.scratch)
        self.scratch.mkdir()
        return self.scratch


def _sizes_to_try(budget: Budget, costs: Costs) -> list[int]:
    """The group sizes that may be quantized, in this order."""
    sizes = fitting_sizes(budget, costs)
    return sizes[-1:] if budget.max_kl is None else sizes


def _trial_bytes(costs: Costs, sizes: Sequence[int]) -> int:
    """What the artifacts of all group sizes take on the disk, with the one that is chosen."""
    return sum(costs.plain[size] for size in sizes) + max(costs.plain.values())


def _has_room_for_statistics(prepared: Mapping[int, Prepared], sizes: Sequence[int], costs: Costs) -> bool:
    """Whether the statistics of one group size help another, and the disk has room for them beside all the rest."""
    first = prepared[sizes[0]]
    if len(sizes) == 1 or not StatisticsFiles.suit(first.plan):
        return False
    needed = _trial_bytes(costs, sizes) + first.plan.state_bytes + StatisticsFiles.size(first.plan)
    with write_errors(first.target):
        return needed < free_space(first.target)


def _prepared_sizes(prepared: Prepared, request: QuantizeRequest) -> dict[int, Prepared]:
    """The request with every group size that it may have."""
    layouts = prepared.plan.layouts
    sizes = [request.group_size] if request.group_size is not None else fitting_group_sizes(layouts)
    found = {}
    for size in sizes:
        plan = prepared.plan
        if size != plan.group_size:
            plan = make_plan(
                prepared.checkpoint,
                prepared.stack,
                size,
                plan.dtype,
                prepared.rows,
                request.max_memory,
                request.quality,
            )
        arguments = request.reported(prepared.stack.device.type, size, prepared.rows.added)
        found[size] = replace(prepared, plan=plan, arguments=arguments)
    return found


def _costs(sizes: dict[int, Prepared]) -> Costs:
    first = next(iter(sizes.values()))
    layouts = first.plan.layouts
    groups = leavable_groups(layouts)
    weights = {group: group.weights(layouts) for group in groups}
    packed = {size: _packed_bytes(prepared, groups) for size, prepared in sizes.items()}
    linears = (linear for layout in layouts for linear in layout.packed().values())
    return Costs(
        plain={size: prepared.plan.file_bytes for size, prepared in sizes.items()},
        extra={size: {g: weights[g] * 2 - own[g] for g in groups} for size, own in packed.items()},
        weights=weights,
        all_weights=sum(linear.outputs * linear.inputs for linear in linears),
    )


def _packed_bytes(prepared: Prepared, groups: list[LeftGroup]) -> dict[LeftGroup, int]:
    """The bytes of the tensors of each group's packed linears."""
    bytes_of: dict[str, int] = {}
    for tensor in prepared.plan.tensors:
        module = tensor.name.rpartition(".")[0]
        bytes_of[module] = bytes_of.get(module, 0) + tensor.nbytes
    key = prepared.checkpoint.artifact_key
    return {g: sum(bytes_of[key(f"{name}.weight").removesuffix(".weight")] for name in g.modules) for g in groups}


def _conditions(prepared: Prepared) -> Fingerprint:
    """Everything that all trials depend on."""
    return {name: value for name, value in prepared.fingerprint().items() if name not in OF_ONE_TRIAL}


def _group_size_at(target: Path) -> int | None:
    """The group size of the artifact that is there already, as far as its report tells."""
    try:
        report = read_quantization_report(target) if (target / REPORT).is_file() else {}
    except GemmaAwqError:
        return None
    return report["artifact"]["group_size"] if report else None


def _with_left(layers: list[list[dict[str, Any]]], left: tuple[LeftGroup, ...]) -> list[list[dict[str, Any]]]:
    """The report's layers, with what was decided for the groups in 16 bits."""
    names = {(group.layer, group.name) for group in left}
    return [
        [
            {**one, "method": LEFT, "exponents": [], "error": 0.0} if (index, one["name"]) in names else one
            for one in layer
        ]
        for index, layer in enumerate(layers)
    ]


def _link(path: Path, to: Path) -> None:
    """Give a finished file another name, or copy it where the disk has no such links."""
    try:
        os.link(path, to)
    except OSError:
        shutil.copy2(path, to)
