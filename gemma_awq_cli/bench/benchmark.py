"""The verb `bench`: speed, fidelity and task scores of models side by side, as one document.

What was measured when a run is interrupted is in the document, which then says that it is not complete.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_awq_cli.bench.document import bench_document, environment, save_beside
from gemma_awq_cli.bench.events import Measured, OnEvent
from gemma_awq_cli.bench.fidelity_stage import measure_fidelity
from gemma_awq_cli.bench.html_page import render
from gemma_awq_cli.bench.measurements import Measurements
from gemma_awq_cli.bench.model_search import find_models
from gemma_awq_cli.bench.own_stages import measure_own
from gemma_awq_cli.bench.request import BenchRequest
from gemma_awq_cli.bench.speed_stage import measure_speed
from gemma_awq_cli.bench.task_suites import LACKING
from gemma_awq_cli.bench.tasks import find_tasks
from gemma_awq_cli.bench.tasks_stage import measure_tasks
from gemma_awq_cli.bench.thresholds import regressions, violations
from gemma_awq_cli.errors import GemmaAwqError, Terminated
from gemma_awq_cli.reports.html_pages import require_page, write_page
from gemma_awq_cli.reports.stored_documents import read_bench_document
from gemma_awq_cli.system.saving import local_path

ELSEWHERE = "choose another --report"


@dataclass(frozen=True)
class BenchResult:
    """document: as docs/bench-schema.json describes it. unmet: a line for each limit that is not met."""

    document: dict[str, Any]
    unmet: tuple[str, ...]


def run_bench(request: BenchRequest, on_event: OnEvent = lambda event: None) -> BenchResult:
    """Measure models, write what was asked for, and compare the figures with the limits.

    on_event: hears what happens; the document, as soon as it is there. An interruption reports the document of what
    was measured until then, and goes on. Raises a usage error for a limit of what is not measured, and an error for a
    model that cannot be measured; a competitor or a task that cannot is left out of the document, which says why.
    """
    request.require_consistent()
    baseline = read_bench_document(request.baseline) if request.baseline is not None else None
    page = local_path(request.report, ELSEWHERE) if request.report is not None else None
    if page is not None:
        require_page(page, "--report", ELSEWHERE)
    measured = Measurements(request.options, on_event, environment(request.options.device))
    try:
        _measure(measured, request)
    except (KeyboardInterrupt, Terminated):
        if measured.models:
            measured.warn("Interrupted: the figures below were measured until then, and are not complete.")
            _publish(measured, page)
        raise
    document = _publish(measured, page)
    if request.save:
        _save(measured, document)
    unmet = list(violations(document, request.limits))
    if baseline is not None:
        unmet += regressions(document, baseline, request.tolerance, measured.warn)
    return BenchResult(document, tuple(unmet))


def _measure(measured: Measurements, request: BenchRequest) -> None:
    options = request.options
    specs = find_tasks(options.tasks) if options.tasks else []
    if any(spec.suite == "safety" for spec in specs):
        measured.note(f"On the model card, but not among the harness's tasks: {', '.join(LACKING)}.")
    find_models(measured, request.models)
    if request.save or request.report is not None:
        _ = [model.report for model in measured.models]  # a damaged report is an error now, not at the end
    if options.speed:
        measure_speed(measured)
        measure_own(measured)
    if options.fidelity:
        measure_fidelity(measured, request.require_fidelity)
    if specs:
        measure_tasks(measured, specs)
    measured.complete = True
    if not any(model.samples or model.fidelity or model.tasks for model in measured.models):
        raise GemmaAwqError("Nothing could be measured.", "The warnings above say why.")


def _publish(measured: Measurements, page: Path | None) -> dict[str, Any]:
    """Report the document, and write the page: first what cannot fail."""
    document = bench_document(measured)
    measured.on_event(Measured(document))
    if page is not None:
        write_page(page, render(document, [model.report for model in measured.models]), ELSEWHERE)
        measured.note(f"Report: {page}")
    return document


def _save(measured: Measurements, document: dict[str, Any]) -> None:
    for model in measured.models:
        if model.role == "model" and model.checkpoint.quantization is not None:
            measured.note(f"Saved {save_beside(model, document)}")
