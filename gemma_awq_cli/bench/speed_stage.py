"""The speed of all models of a bench: each in its own process, all loaded at once, a repetition of each in turn.

So whatever else the machine does meanwhile affects all of them alike.
"""

from collections.abc import Callable
from itertools import product
from typing import Any

from gemma_awq_cli.bench import process
from gemma_awq_cli.bench.events import StageStarted, counted
from gemma_awq_cli.bench.measurements import BenchModel, Measurements
from gemma_awq_cli.bench.prompts import random_prompts
from gemma_awq_cli.bench.request import BenchOptions
from gemma_awq_cli.errors import GemmaAwqError

WARM_UP_TOKENS = 16

Workers = dict[BenchModel, process.Worker]  # of the models that have not failed


def measure_speed(measured: Measurements) -> None:
    """Measure every model. A competitor that fails is left out from then on; a model that fails is an error."""
    options = measured.options
    measured.on_event(StageStarted("Speed"))
    repetitions = range(-options.warmup, options.repetitions)  # the negative ones do not count
    runs = list(product(options.batches, options.depths))
    steps = len(measured.models) * (1 + len(runs) * len(repetitions))
    step = counted(steps, measured.on_progress)
    workers: Workers = {}
    try:
        _load(measured, workers, step)
        for batch, depth in runs:
            for repetition in repetitions:
                _repeat(measured, workers, batch, depth, repetition, step)
                answer = next(iter(workers.values())).ask(do="bandwidth")
                measured.bandwidths.append(answer["bytes_per_second"])
    finally:
        for worker in workers.values():
            worker.end()


def _load(measured: Measurements, workers: Workers, step: Callable[[], None]) -> None:
    options = measured.options
    longest = max(options.depths) + options.prompt_tokens + options.new_tokens
    for model in measured.models:
        workers[model] = process.Worker(model.name, options.threads)
        model.loaded = _ask(
            measured, workers, model, do="load", kind=model.kind, path=str(model.path), adapter=model.adapter,
            device=options.device, threads=options.threads, rows=max(options.batches),
            tokens=longest + 1,
        )  # fmt: skip
        if model.loaded is not None and longest > model.loaded["context"]:
            _failed(measured, workers, model, _too_long(options, model.loaded["context"]))
        step()


def _too_long(options: BenchOptions, context: int) -> GemmaAwqError:
    deepest = max(options.depths)
    depth = f"A depth of {deepest}, " if deepest else ""
    return GemmaAwqError(
        f"{depth}{options.prompt_tokens} prompt tokens and {options.new_tokens} new ones exceed this model's context "
        f"of {context}.",
        "Give smaller --depth, --pp and --tg." if deepest else "Give smaller --pp and --tg.",
    )


def _repeat(
    measured: Measurements, workers: Workers, batch: int, depth: int, repetition: int, step: Callable[[], None]
) -> None:
    """One repetition of every model, each time another one first."""
    options = measured.options
    counts = repetition >= 0
    new_tokens = options.new_tokens if counts else min(options.new_tokens, WARM_UP_TOKENS)
    before, prompts = _prompts(measured, batch, depth, repetition)
    models = list(workers)
    first = repetition % len(models)
    for model in (*models[first:], *models[:first]):
        sample = _ask(measured, workers, model, do="sample", before=before, prompts=prompts, new_tokens=new_tokens)
        if sample is not None and counts:
            model.samples.setdefault((batch, depth), []).append(sample)
        step()


def _ask(measured: Measurements, workers: Workers, model: BenchModel, **request: Any) -> dict[str, Any] | None:
    """The answer, or None if the model is a competitor and failed."""
    try:
        return workers[model].ask(**request)
    except GemmaAwqError as error:
        if prompts := request.get("prompts"):
            model.samples.pop((len(prompts), len(request["before"][0])), None)  # of the run that it failed at
        _failed(measured, workers, model, error)
        return None


def _failed(measured: Measurements, workers: Workers, model: BenchModel, error: GemmaAwqError) -> None:
    """Leave a competitor out from now on; raise the error of a model."""
    if model.role == "model":
        raise error
    workers.pop(model).end()
    measured.leave_out(model.name, "speed", error)


def _prompts(
    measured: Measurements, batch: int, depth: int, repetition: int
) -> tuple[list[list[int]], list[list[int]]]:
    """What is read before, [batch, depth], and prompts [batch, prompt_tokens], the same for every model."""
    loaded = [model.loaded for model in measured.models if model.loaded is not None]
    bos, vocabulary = loaded[0]["bos"], min(facts["vocabulary"] for facts in loaded)
    length = depth + measured.options.prompt_tokens
    rows = random_prompts(f"{batch} {repetition}", batch, length, bos, vocabulary)
    return [row[:depth] for row in rows], [row[depth:] for row in rows]
