"""The scores of the models of a bench in tasks: every model in its own process, one after another.

A task that fails leaves the others alone: if it takes the process with it, the next task gets a new one.
"""

from collections.abc import Sequence
from dataclasses import asdict

from gemma_awq_cli.bench import process
from gemma_awq_cli.bench.events import OnProgress, StageStarted
from gemma_awq_cli.bench.measurements import BenchModel, Measurements
from gemma_awq_cli.bench.model_kinds import GGUF, VLLM
from gemma_awq_cli.bench.process import WorkerEndedError
from gemma_awq_cli.bench.tasks import TaskSpec, published
from gemma_awq_cli.errors import GemmaAwqError

STEPS = 100  # of the progress of one task


def measure_tasks(measured: Measurements, specs: Sequence[TaskSpec]) -> None:
    """Measure every model in every task. A failure is left out."""
    for model in measured.models:
        if model.kind in (GGUF, VLLM):
            error = GemmaAwqError("Tasks need a model that this tool loads itself.")
            measured.leave_out(model.name, "tasks", error)
            continue
        measured.on_event(StageStarted(f"Tasks of {model.name}"))
        _measure_model(measured, model, specs)


def _measure_model(measured: Measurements, model: BenchModel, specs: Sequence[TaskSpec]) -> None:
    options, names = measured.options, _names(measured, model)
    worker: process.Worker | None = None
    try:
        for index, spec in enumerate(specs):
            on_progress = _of_one_task(measured, index, len(specs))
            on_progress(0, 1)
            if worker is None:
                worker = _open(measured, model)
            if worker is None:
                return
            try:
                result = worker.ask(
                    on_progress, do="task", spec=asdict(spec), limit=options.task_limit,
                    unsafe_code=options.confirm_run_unsafe_code,
                )  # fmt: skip
            except GemmaAwqError as error:
                measured.leave_out(model.name, f"task {spec.name}", error)
                if isinstance(error, WorkerEndedError):
                    worker.end()
                    worker = None
            else:
                model.tasks.append({**result, "published": published(names, spec.task, spec.suite)})
    finally:
        if worker is not None:
            worker.end()


def _open(measured: Measurements, model: BenchModel) -> process.Worker | None:
    """A process with the model; None, and the model's tasks left out, if it cannot be loaded."""
    options = measured.options
    worker = process.Worker(model.name, options.threads)
    try:
        worker.ask(
            do="open", kind=model.kind, path=str(model.path), adapter=model.adapter, device=options.device,
            threads=options.threads,
        )  # fmt: skip
    except BaseException as error:
        worker.end()
        if not isinstance(error, GemmaAwqError):
            raise
        measured.leave_out(model.name, "tasks", error)
        return None
    return worker


def _of_one_task(measured: Measurements, index: int, count: int) -> OnProgress:
    """Reports the progress of one of `count` tasks as that of all."""
    return lambda done, total: measured.on_progress(index * STEPS + done * STEPS // total, count * STEPS)


def _names(measured: Measurements, model: BenchModel) -> list[str]:
    """The names by which the model card may know a model: its own, and that of the 16-bit model it was made of."""
    names = [model.name, str(model.checkpoint.folder)]
    report = (model if model.report or model.role == "model" else measured.models[0]).report
    return names if report is None else [*names, str(report["source"]["model"])]
