"""The verb `run`, a function for each of its three modes: one prompt, a chat, a file of prompts."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from gemma_awq_cli.events import Note
from gemma_awq_cli.generate.batch import (
    Batch,
    complete_batch,
    read_finished,
    recorded_seed,
    require_free,
    sole_writer,
    token_rows,
)
from gemma_awq_cli.generate.chat import Chat
from gemma_awq_cli.generate.events import (
    BatchResumed,
    BatchStarted,
    BatchStopped,
    OnEvent,
    PromptCompleted,
    StageEnded,
)
from gemma_awq_cli.generate.finding import FoundModel
from gemma_awq_cli.generate.generation import Completion, Engine, GenerationOptions
from gemma_awq_cli.generate.opening import choose_sampling, open_engine, read_checkpoint
from gemma_awq_cli.generate.prompt_file import read_prompts
from gemma_awq_cli.generate.prompting import Prompt, prompt_ids
from gemma_awq_cli.generate.request import BatchFiles, RunRequest
from gemma_awq_cli.generate.sampling import Sampling
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.text.prompter import Prompter
from gemma_awq_cli.system.background import begin


@dataclass(frozen=True)
class PromptResult:
    """The completion of a prompt and the sampling settings that it was made with.

    logprobs: see `Completion.logprob_documents`.
    """

    completion: Completion
    sampling: Sampling
    logprobs: dict[str, Any]


@dataclass(frozen=True)
class BatchResult:
    """What one run over a file of prompts has done.

    prompts: of the input. completions: those of this run, in the order in which they ended. seconds: the time that they
    took, without the opening of the model. whole: whether all prompts are completed now; False if Ctrl-C ended the run.
    """

    prompts: int
    completions: tuple[Completion, ...]
    seconds: float
    whole: bool


def run_prompt(
    request: RunRequest,
    found: FoundModel,
    prompt: Prompt,
    on_text: Callable[[str], None],
    on_thought: Callable[[str], None],
    on_event: OnEvent,
) -> PromptResult:
    """Complete or answer one prompt.

    on_text, on_thought: called with each piece of the text and of the thoughts before it as soon as it is certain.
    """

    checkpoint = read_checkpoint(found, on_event)

    def encode() -> list[int]:
        prompter = found.prompter.result()
        prompter.fit_to(checkpoint.vocabulary)
        return prompt_ids(prompter, prompt, request.system, request.raw, request.think, request.tools)

    encoding = begin(encode)  # while the weights are packed
    options = _options(request, checkpoint, on_event)
    on_event(StageEnded("config and file headers"))
    engine = open_engine(
        checkpoint, found, request.engine, 1, lambda _: len(encoding.result()) + options.max_new_tokens, on_event
    )
    ids = encoding.result()
    if request.tools:
        options = replace(options, tools=engine.prompter.tool_format)
    on_event(StageEnded("waiting for the tokenizer"))
    with _prompt_files(request, checkpoint, engine, ids, options.max_new_tokens, on_event):
        (completion,) = engine.complete(
            [ids], options, lambda _, piece: on_text(piece), on_thought=lambda _, piece: on_thought(piece)
        )
    return PromptResult(completion, options.sampling, completion.logprob_documents(engine.prompter.tokenizer))


@contextmanager
def _prompt_files(
    request: RunRequest, checkpoint: Checkpoint, engine: Engine, ids: list[int], new_tokens: int, on_event: OnEvent
) -> Iterator[None]:
    """Begin with the state in `request.load_cache`, and leave that after the prompt in `request.save_cache`."""
    if request.load_cache is None and request.save_cache is None:
        yield
        return
    from gemma_awq_cli.generate.local_engine import LocalEngine
    from gemma_awq_cli.generate.prompt_cache import ReadPrompt, read_prompt_cache, settings_of, write_prompt_cache

    assert isinstance(engine, LocalEngine)
    settings = settings_of(checkpoint, engine.opened)
    if request.load_cache is not None:
        read = read_prompt_cache(request.load_cache, settings, checkpoint.vocabulary)
        spared = engine.go_on_from(ids, read.row, read.ids, new_tokens)
        on_event(Note(f"{spared} of the prompt's {len(ids)} tokens have been read before ({request.load_cache})."))
    if request.save_cache is not None:
        engine.keep_prompt()
    yield
    if request.save_cache is not None and engine.read_prompt is not None:
        write_prompt_cache(request.save_cache, ReadPrompt(ids, engine.read_prompt), settings)


def open_chat(request: RunRequest, found: FoundModel, on_event: OnEvent) -> Chat:
    """Open the model for a chat; a base model completes each message by itself."""
    checkpoint = read_checkpoint(found, on_event)
    options = _options(request, checkpoint, on_event)
    engine = open_engine(checkpoint, found, request.engine, 1, None, on_event)
    return Chat(engine, options, request.system, request.raw, request.think, request.tools)


def run_batch(request: RunRequest, found: FoundModel, files: BatchFiles, on_event: OnEvent) -> BatchResult:
    """Complete the prompts of a file that the output does not have yet, and append each completion as it ends."""
    prompts = read_prompts(files.input)
    with sole_writer(files.output):
        require_free(files.output, files.resume)
        asked = request.generation.sampling
        if files.resume and asked.seed is None:
            asked = replace(asked, seed=recorded_seed(files.output))
        request = replace(request, generation=replace(request.generation, sampling=asked))
        checkpoint = read_checkpoint(found, on_event)
        options = _options(request, checkpoint, on_event)
        made_with = _made_with(request, checkpoint, options)
        batch = Batch(prompts, request.system, request.raw, options, made_with, request.think, request.tools)
        finished = read_finished(files.output, batch)
        if finished:
            on_event(BatchResumed(len(finished), len(prompts), files.output))
        if len(finished) == len(prompts):
            return BatchResult(len(prompts), (), 0.0, whole=True)
        return _complete_rest(request, found, files, checkpoint, batch, finished, on_event)


def _complete_rest(
    request: RunRequest,
    found: FoundModel,
    files: BatchFiles,
    checkpoint: Checkpoint,
    batch: Batch,
    finished: dict[int, dict[str, Any]],
    on_event: OnEvent,
) -> BatchResult:
    """Open the model and complete the prompts that are not in `finished`."""

    def longest(prompter: Prompter) -> int:
        return max(map(len, token_rows(prompter, batch))) + batch.options.max_new_tokens

    completions: list[Completion] = []

    def on_row(index: int, completion: Completion) -> None:
        completions.append(completion)
        on_event(PromptCompleted(index, completion))

    engine = open_engine(checkpoint, found, request.engine, files.batch_size, longest, on_event)
    total = len(batch.prompts)
    on_event(BatchStarted(len(finished), total))
    started = time.perf_counter()
    try:
        whole = complete_batch(engine, batch, files.output, finished, on_row)
    finally:
        seconds = time.perf_counter() - started
        if (done := len(finished) + len(completions)) < total:
            on_event(BatchStopped(done, total, files.output))
    return BatchResult(total, tuple(completions), seconds, whole)


def _options(request: RunRequest, checkpoint: Checkpoint, on_event: OnEvent) -> GenerationOptions:
    """Return the request's options with the sampling settings completed by the model's."""
    asked = request.generation
    return replace(asked, sampling=choose_sampling(checkpoint, asked.sampling, on_event))


def _made_with(request: RunRequest, checkpoint: Checkpoint, options: GenerationOptions) -> dict[str, Any]:
    """Return all that the completions depend on, as plain JSON under the names of the options."""
    sampling, engine = options.sampling, request.engine
    think = {} if request.think is None else {"think": request.think}
    # what earlier versions did not know is left out unless it is used, so that their output can be continued
    later = {
        "presence_penalty": sampling.presence_penalty or None, "frequency_penalty": sampling.frequency_penalty or None,
        "logprobs": options.logprobs, "tools": list(request.tools) or None,
        **({} if options.grammar is None else {options.grammar.kind: options.grammar.text}),
    }  # fmt: skip
    return {
        "model": checkpoint.folder.resolve().name, "model_id": checkpoint.identity()[:16], "engine": engine.engine,
        "dtype": engine.dtype, "quantization": engine.quantization, "attn": engine.attention,
        "max_new_tokens": options.max_new_tokens, "temperature": sampling.temperature, "top_k": sampling.top_k,
        "top_p": sampling.top_p, "min_p": sampling.min_p, "repetition_penalty": sampling.repetition_penalty,
        "seed": sampling.seed, "stop": list(options.stop), "system": request.system, "raw": request.raw,
        **think, **{name: value for name, value in later.items() if value is not None},
    }  # fmt: skip
