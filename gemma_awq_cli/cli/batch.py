"""`gemma-awq run --input FILE --output FILE`: the screen of a batch."""

import time
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from gemma_awq_cli.cli.console import Output
from gemma_awq_cli.cli.engine_options import EngineOptions
from gemma_awq_cli.cli.engines import read_model, start_engine
from gemma_awq_cli.generate.batch import (
    Batch,
    complete_batch,
    read_finished,
    recorded_seed,
    require_free,
    sole_writer,
    token_rows,
)
from gemma_awq_cli.generate.generation import Completion, GenerationOptions
from gemma_awq_cli.generate.prompt_file import Prompt, read_prompts
from gemma_awq_cli.models.text.prompter import Prompter

if TYPE_CHECKING:
    from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint


@dataclass(frozen=True)
class BatchOptions:
    """The options of a batch, as they were given."""

    source: Path
    target: Path
    batch_size: int
    resume: bool
    system: str | None
    raw: bool


def run(
    out: Output,
    folder: Path,
    loading: Future[Prompter],
    how: EngineOptions,
    work: BatchOptions,
    asked: GenerationOptions,
    as_json: bool,
) -> None:
    """Complete the prompts of a file; the answers' file is printed on stdout."""
    prompts = read_prompts(work.source)
    with sole_writer(work.target):
        _run(out, folder, loading, how, work, asked, prompts, as_json)


def _run(
    out: Output,
    folder: Path,
    loading: Future[Prompter],
    how: EngineOptions,
    work: BatchOptions,
    asked: GenerationOptions,
    prompts: list[Prompt],
    as_json: bool,
) -> None:
    require_free(work.target, work.resume)
    sampling = asked.sampling
    if work.resume and sampling.seed is None:
        sampling = replace(sampling, seed=recorded_seed(work.target))
    checkpoint, sampling = read_model(out, folder, sampling)
    settings = replace(asked, sampling=sampling)
    batch = Batch(prompts, work.system, work.raw, settings, _made_with(checkpoint, how, work, settings))
    finished = read_finished(work.target, batch)
    if finished:
        out.note(f"{len(finished)} of {len(prompts)} prompts are in {work.target} already.")
    completions: list[Completion] = []
    seconds = 0.0
    whole = True
    if len(finished) < len(prompts):

        def longest(prompter: Prompter) -> int:
            return max(map(len, token_rows(prompter, batch))) + settings.max_new_tokens

        engine = start_engine(out, checkpoint, loading, how, work.batch_size, longest)
        started = time.perf_counter()
        with out.progress("Completing", len(prompts)) as progress:
            progress.begin_at(len(finished), len(prompts))

            def on_row(index: int, completion: Completion) -> None:
                completions.append(completion)
                progress.step()

            try:
                whole = complete_batch(engine, batch, work.target, finished, on_row)
            finally:
                seconds = time.perf_counter() - started
                there = len(finished) + len(completions)
                if there < len(prompts):
                    out.note(f"{there} of {len(prompts)} prompts are in {work.target}: --resume goes on after them.")
    if not whole:
        raise typer.Exit(130)
    _report(out, work.target, len(prompts), completions, seconds, as_json)


def _made_with(
    checkpoint: "Checkpoint", how: EngineOptions, work: BatchOptions, settings: GenerationOptions
) -> dict[str, Any]:
    """All that the answers depend on, in plain JSON."""
    sampling = settings.sampling
    return {
        "model": checkpoint.folder.resolve().name, "model_id": checkpoint.identity()[:16], "engine": how.engine.value,
        "dtype": how.dtype and how.dtype.value, "quantization": how.quantization and how.quantization.value,
        "attn": how.attn and how.attn.value, "max_new_tokens": settings.max_new_tokens,
        "temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p, "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty, "seed": sampling.seed, "stop": list(settings.stop),
        "system": work.system, "raw": work.raw,
    }  # fmt: skip


def _report(
    out: Output, target: Path, prompts: int, completions: list[Completion], seconds: float, as_json: bool
) -> None:
    tokens = sum(len(completion.tokens) for completion in completions)
    if as_json:
        out.document(
            {
                "output": str(target), "prompts": prompts, "completed_now": len(completions), "tokens": tokens,
                "seconds": round(seconds, 2),
            }
        )  # fmt: skip
    else:
        out.result(str(target))
    rate = f", {tokens / seconds:.1f} a second" if seconds else ""
    out.note(f"{len(completions)} prompts, {tokens} new tokens{rate}.")
