"""The verb `run`: continue prompts, token by token, and hand out text as it becomes certain.

An `Engine` continues rows of token ids; a single prompt, a chat and a batch are all built on it. `LocalEngine` is the
one of this tool, which knows a model by its sessions only; `vllm_engine.py` is another.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.models.checkpoint import Checkpoint
from gemma_awq_cli.models.files import read_json
from gemma_awq_cli.models.memory import memory_errors
from gemma_awq_cli.models.opening import OpenModel
from gemma_awq_cli.models.prompting import Message, Prompter
from gemma_awq_cli.models.session import Session
from gemma_awq_cli.sampling import Chooser, Sampling
from gemma_awq_cli.text_stream import TextStream

GENERATION_CONFIG = "generation_config.json"
KEPT_TOKENS = 512  # the least that a session which waits for further turns has room for


@dataclass(frozen=True)
class Settings:
    """How rows are continued, whoever does it. stop: texts that a row ends before."""

    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: Sequence[str] = ()


@dataclass
class Completion:
    """What was generated. finish: `stop` (end of text or a stop string), `length` or `interrupted`.

    tokens: what the model chose, an end token included; read_tokens: how many of the prompt's tokens were not in a live
    session already.
    """

    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: str = "length"
    read_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def prefill_rate(self) -> float:
        return self.read_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens a second after the first, which comes out of the prefill."""
        return (len(self.tokens) - 1) / self.decode_seconds if self.decode_seconds and len(self.tokens) > 1 else 0.0


class Engine(Protocol):
    """Something that continues rows of token ids with one model."""

    prompter: Prompter
    context: int  # the most tokens that a row may have, answer included

    def complete(
        self,
        rows: Sequence[Sequence[int]],
        settings: Settings,
        on_text: Callable[[int, str], None],
        on_done: Callable[[int, Completion], None] = lambda row, completion: None,
        numbers: Sequence[int] | None = None,
    ) -> list[Completion]:
        """Continue each row until it ends, reaches `max_new_tokens` or fills the context.

        on_text: (row, piece), the pieces of a row together are its text. on_done: (row, completion) as soon as a row
        ends by itself. numbers: what tells the rows' random numbers apart, by default 0, 1, ...; it is the row's alone,
        so its tokens do not depend on its company. Ctrl-C ends the rows that are unfinished and keeps their text;
        if there are none it is passed on.
        """
        ...


def prompt_ids(prompter: Prompter, prompt: str | Sequence[Message], system: str | None, raw: bool) -> list[int]:
    """The token ids of a prompt or of a conversation: through the chat template of an instruct model unless `raw`."""
    if raw or not prompter.is_chat:
        switched = ", which --raw switches off." if raw and prompter.is_chat else "."
        if system:
            raise UsageError(f"--system needs a model with a chat template{switched}")
        if not isinstance(prompt, str):
            raise UsageError(f"Messages need a model with a chat template{switched}")
        return prompter.prompt_ids(prompt)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return prompter.prompt_ids(prompter.chat(messages, answer_next=True))


def require_room(length: int, context: int, what: str = "The prompt") -> None:
    """An error if a prompt of `length` tokens leaves no room for an answer."""
    if length >= context:
        raise GemmaAwqError(f"{what} has {length} tokens; this model's context holds {context}.", "Shorten it.")


def generation_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the model's makers say of its generation; empty if they say nothing."""
    path = checkpoint.folder / GENERATION_CONFIG
    return read_json(path) if path.is_file() else {}


def context_of(checkpoint: Checkpoint) -> int:
    return int(checkpoint.facts.max_position_embeddings)


def end_tokens(checkpoint: Checkpoint, prompter: Prompter) -> set[int]:
    """The model's end tokens: the generation config's, the tokenizer's, and the end of a chat turn."""
    declared = generation_config(checkpoint).get("eos_token_id")
    ends = set(declared if isinstance(declared, list) else [] if declared is None else [declared])
    own = [prompter.tokenizer.special_id("eos_token")]
    if prompter.is_chat:
        own.append(prompter.tokenizer.id_of("<end_of_turn>"))
    return ends | {token for token in own if token is not None}


def complete(
    opened: OpenModel,
    ids: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    stop: Sequence[str],
    on_text: Callable[[str], None],
) -> Completion:
    """Continue one prompt's token ids. `on_text` is given each piece of text once."""
    settings = Settings(max_new_tokens, sampling, stop)
    return LocalEngine(opened).complete([ids], settings, lambda _, piece: on_text(piece))[0]


@dataclass
class _Live:
    """A session of one row that waits for the next turn, and what it has read."""

    session: Session
    capacity: int
    read: list[int]


@dataclass
class _Row:
    """One row while it is generated."""

    ids: Sequence[int]
    limit: int
    completion: Completion
    chooser: Chooser
    text: TextStream
    done: bool = False


class LocalEngine:
    """Generates with this tool's own sessions.

    keep: hold the session of a single row, so that a prompt that goes on where it ended feeds only the new tokens.
    """

    def __init__(self, opened: OpenModel, keep: bool = False) -> None:
        self.prompter = opened.prompter
        self.context = context_of(opened.checkpoint)
        self._opened = opened
        self._ends = end_tokens(opened.checkpoint, opened.prompter)
        self._keep = keep
        self._live: _Live | None = None

    @torch.inference_mode()
    def complete(
        self,
        rows: Sequence[Sequence[int]],
        settings: Settings,
        on_text: Callable[[int, str], None],
        on_done: Callable[[int, Completion], None] = lambda row, completion: None,
        numbers: Sequence[int] | None = None,
    ) -> list[Completion]:
        """See `Engine`. Rows advance together until the last one ends; a row that has ended is fed on, unread."""
        for index, ids in enumerate(rows):
            require_room(len(ids), self.context, "The prompt" if len(rows) == 1 else f"Prompt {index + 1}")
        work = [self._row(index, ids, settings, on_text, numbers) for index, ids in enumerate(rows)]
        hint = "Use fewer tokens (--max-new-tokens, a shorter prompt), fewer prompts at once (--batch-size), or 4 bits."
        try:
            with memory_errors("generating", hint):
                self._generate(work, on_done)
        except KeyboardInterrupt:
            self._live = None  # the cache may be half-way through a token
            if all(row.done for row in work):
                raise  # too late for these rows, but whoever brings more must hear of it
            for row in work:
                if not row.done:
                    row.completion.finish = "interrupted"
                    row.completion.text = row.text.finish()
        except BaseException:
            self._live = None
            raise
        return [row.completion for row in work]

    def _row(
        self,
        index: int,
        ids: Sequence[int],
        settings: Settings,
        on_text: Callable[[int, str], None],
        numbers: Sequence[int] | None,
    ) -> _Row:
        limit = min(settings.max_new_tokens, self.context - len(ids))
        chooser = Chooser(settings.sampling, numbers[index] if numbers else index, ids)
        text = TextStream(self.prompter.tokenizer, settings.stop, lambda piece: on_text(index, piece))
        return _Row(ids, limit, Completion(len(ids)), chooser, text)

    def _generate(self, work: list[_Row], on_done: Callable[[int, Completion], None]) -> None:
        session, steps = self._begin(work)
        for row, step in zip(work, steps, strict=True):
            row.completion.read_tokens = len(step)
        started = time.perf_counter()
        prefilled = 0.0
        while not all(row.done for row in work):
            logits = session.feed(steps)
            require_numbers(logits)
            if self._live is not None:
                self._live.read += steps[0]
            steps = []
            for index, row in enumerate(work):
                token = 0
                if not row.done:
                    token = row.chooser.choose(logits[index])
                    now = time.perf_counter()
                    prefilled = prefilled or now
                    row.completion.prefill_seconds = prefilled - started
                    row.completion.decode_seconds = now - prefilled
                    self._take(row, token)
                    if row.done:
                        on_done(index, row.completion)
                steps.append([token])

    def _take(self, row: _Row, token: int) -> None:
        """Add a token to its row, and end the row if that ends it."""
        completion = row.completion
        completion.tokens.append(token)
        if token in self._ends or row.text.add(token):
            completion.finish = "stop"
            row.done = True
        elif len(completion.tokens) == row.limit:
            row.done = True
        if row.done:
            completion.text = row.text.finish()

    def _begin(self, work: list[_Row]) -> tuple[Session, list[Sequence[int]]]:
        """A session for these rows, and what it is to be fed first."""
        needed = max(len(row.ids) for row in work) + max(row.limit for row in work)
        live, self._live = self._live, None
        if live is not None and len(work) == 1 and needed <= live.capacity:
            ids, read = list(work[0].ids), len(live.read)
            if read < len(ids) and ids[:read] == live.read:
                self._live = live
                return live.session, [ids[read:]]
        if self._keep and len(work) == 1:
            needed = min(self.context, max(2 * needed, KEPT_TOKENS))  # room for the next turns
            session = self._opened.session(1, needed)
            self._live = _Live(session, needed, [])
            return session, [work[0].ids]
        return self._opened.session(len(work), needed), [row.ids for row in work]


def require_numbers(logits: Tensor) -> None:
    """An error if any logit is NaN or infinite: what it would be turned into is `<pad>` text."""
    # the least and the largest tell it, and take a twentieth of the time of a look at each
    if not all(torch.isfinite(torch.stack(torch.aminmax(logits)))):
        raise GemmaAwqError(
            "The model's output is NaN or infinite.",
            "If you gave --dtype float16, give bfloat16: its range is wider. Otherwise the weights are damaged.",
        )
