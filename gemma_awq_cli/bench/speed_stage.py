"""The speed of all models of a bench: each in its own process, all loaded at once, a repetition of each in turn.

So whatever else the machine does meanwhile affects all of them alike.
"""

import random
from collections.abc import Callable
from typing import Any

from gemma_awq_cli.bench import process
from gemma_awq_cli.bench.events import StageStarted, counted
from gemma_awq_cli.bench.measurements import BenchModel, Measurements
from gemma_awq_cli.errors import GemmaAwqError

WARM_UP_TOKENS = 16

Workers = dict[BenchModel, process.Worker]  # of the models that have not failed


def measure_speed(measured: Measurements) -> None:
    """Measure every model. A competitor that fails is left out from then on; a model that fails is an error."""
    options = measured.options
    measured.on_event(StageStarted("Speed"))
    repetitions = range(-options.warmup, options.repetitions)  # the negative ones do not count
    steps = len(measured.models) * (1 + len(options.batches) * len(repetitions))
    step = counted(steps, measured.on_progress)
    workers: Workers = {}
    try:
        _load(measured, workers, step)
        for batch in options.batches:
            for repetition in repetitions:
                _repeat(measured, workers, batch, repetition, step)
                answer = next(iter(workers.values())).ask(do="bandwidth")
                measured.bandwidths.append(answer["bytes_per_second"])
    finally:
        for worker in workers.values():
            worker.end()


def _load(measured: Measurements, workers: Workers, step: Callable[[], None]) -> None:
    options = measured.options
    for model in measured.models:
        workers[model] = process.Worker(model.name, options.threads)
        model.loaded = _ask(
            measured, workers, model, do="load", kind=model.kind, path=str(model.path), adapter=model.adapter,
            device=options.device, threads=options.threads, rows=max(options.batches),
            tokens=options.prompt_tokens + options.new_tokens + 1,
        )  # fmt: skip
        step()


def _repeat(measured: Measurements, workers: Workers, batch: int, repetition: int, step: Callable[[], None]) -> None:
    """One repetition of every model, each time another one first."""
    options = measured.options
    counts = repetition >= 0
    new_tokens = options.new_tokens if counts else min(options.new_tokens, WARM_UP_TOKENS)
    prompts = _prompts(measured, batch, repetition)
    models = list(workers)
    first = repetition % len(models)
    for model in (*models[first:], *models[:first]):
        sample = _ask(measured, workers, model, do="sample", prompts=prompts, new_tokens=new_tokens)
        if sample is not None and counts:
            model.samples.setdefault(batch, []).append(sample)
        step()


def _ask(measured: Measurements, workers: Workers, model: BenchModel, **request: Any) -> dict[str, Any] | None:
    """The answer, or None if the model is a competitor and failed."""
    try:
        return workers[model].ask(**request)
    except GemmaAwqError as error:
        if model.role == "model":
            raise
        workers.pop(model).end()
        model.samples.pop(len(request.get("prompts", ())), None)  # of the batch size that it failed at
        measured.leave_out(model.name, "speed", error)
        return None


def _prompts(measured: Measurements, batch: int, repetition: int) -> list[list[int]]:
    """Prompts [batch, prompt_tokens] of random tokens: the same for every model, and in every bench."""
    rng = random.Random(f"{batch} {repetition}")
    loaded = [model.loaded for model in measured.models if model.loaded is not None]
    bos, vocabulary = loaded[0]["bos"], min(facts["vocabulary"] for facts in loaded)
    length = measured.options.prompt_tokens - 1
    return [[bos, *(rng.randrange(vocabulary) for _ in range(length))] for _ in range(batch)]
