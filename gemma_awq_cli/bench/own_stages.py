"""What is measured of this tool's own commands alone: how soon `run` answers, streams of `serve`, and drafted tokens.

They start processes of their own, after those that measured the speed have ended. Other runtimes have none of this.
"""

from collections.abc import Callable

from gemma_awq_cli.bench import process
from gemma_awq_cli.bench.events import StageStarted, counted
from gemma_awq_cli.bench.first_token import first_token_seconds
from gemma_awq_cli.bench.measurements import BenchModel, Measurements
from gemma_awq_cli.bench.model_kinds import OWN
from gemma_awq_cli.bench.prompts import random_prompts
from gemma_awq_cli.bench.streams import measure_streams, served
from gemma_awq_cli.errors import GemmaAwqError


def measure_own(measured: Measurements) -> None:
    """Measure what was asked for of every model that `gemma-awq run` opens as the bench does.

    A competitor that fails is left out; a model that fails is an error.
    """
    models = [model for model in measured.models if model.kind == OWN and model.adapter is None]
    for asked, title, measure in (
        (measured.options.first_token, "first token", _first_tokens),
        (bool(measured.options.streams), "streams", _streams),
        (measured.options.draft is not None, "drafted tokens", _drafts),
    ):
        if asked:
            measured.on_event(StageStarted(title.capitalize()))
            _measure_each(measured, models, title, measure)


def _measure_each(
    measured: Measurements, models: list[BenchModel], part: str, measure: Callable[[Measurements, BenchModel], None]
) -> None:
    for model in models:
        try:
            measure(measured, model)
        except GemmaAwqError as error:
            if model.role == "model":
                raise
            measured.leave_out(model.name, part, error)


def _first_tokens(measured: Measurements, model: BenchModel) -> None:
    options = measured.options
    step = counted(options.repetitions, measured.on_progress)
    for _ in range(options.repetitions):
        model.first_tokens.append(first_token_seconds(model.path, options.device, options.threads))
        step()


def _streams(measured: Measurements, model: BenchModel) -> None:
    options, loaded = measured.options, model.loaded
    if loaded is None:  # it could not be loaded, which has been said
        return
    # one step for the start; the first requests of all, which do not count, are for what is read lazily
    step = counted(2 + len(options.streams), measured.on_progress)

    def prompts(name: str, count: int) -> list[list[int]]:
        return random_prompts(name, count, options.prompt_tokens, loaded["bos"], loaded["vocabulary"])

    context = options.prompt_tokens + options.new_tokens
    with served(model.path, options.device, options.threads, max(options.streams), context) as url:
        step()
        measure_streams(url, 1, prompts("first", 1), options.new_tokens)
        step()
        for streams in options.streams:
            asked = prompts(f"streams {streams}", streams * options.repetitions)
            model.streams.append(measure_streams(url, streams, asked, options.new_tokens))
            step()


def _drafts(measured: Measurements, model: BenchModel) -> None:
    options = measured.options
    worker = process.Worker(model.name, options.threads)
    try:
        model.drafts = worker.ask(
            measured.on_progress, do="drafts", path=str(model.path), device=options.device, threads=options.threads,
            draft=options.draft, tokens=options.new_tokens, rounds=options.repetitions,
        )  # fmt: skip
    finally:
        worker.end()
