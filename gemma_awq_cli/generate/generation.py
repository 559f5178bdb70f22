"""The verb `run`: continue prompts, token by token, and hand out text as it becomes certain.

An `Engine` continues rows of token ids; a single prompt, a chat and a batch are all built on it. This tool's own is in
`local_engine.py`, vLLM's in `vllm_engine.py`.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.generate.sampling import CORRECT, Sampling
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.files import read_json
from gemma_awq_cli.models.text.detokenizer import TextStream
from gemma_awq_cli.models.text.prompter import Message, Prompter

GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class GenerationOptions:
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


@dataclass
class Row:
    """One row while it is generated. index: its place among the rows of the call; number: see `Engine.complete`.

    limit: the most tokens that it may be given; ends: the tokens that end it.
    """

    index: int
    number: int
    ids: Sequence[int]
    limit: int
    ends: Set[int]
    text: TextStream
    completion: Completion
    done: bool = False
    _started: float = 0.0

    def begin(self, read_tokens: int) -> None:
        """The engine starts on it, and has to read so many tokens of the prompt."""
        self.completion.read_tokens = read_tokens
        self._started = time.perf_counter()

    def take(self, token: int) -> None:
        """The next token, which may end it."""
        completion = self.completion
        seconds = time.perf_counter() - self._started
        if not completion.tokens:
            completion.prefill_seconds = seconds
        completion.decode_seconds = seconds - completion.prefill_seconds
        completion.tokens.append(token)
        if token in self.ends or self.text.add(token):
            completion.finish = "stop"
            self.done = True
        elif len(completion.tokens) == self.limit:
            self.done = True
        if self.done:
            completion.text = self.text.finish()

    def interrupt(self) -> None:
        """It ends as it is, unless it has ended."""
        if not self.done:
            self.completion.finish = "interrupted"
            self.completion.text = self.text.finish()


class Engine(ABC):
    """Something that continues rows of token ids with one model.

    context: the most tokens that a row may have, answer included; ends: the tokens that end a row.
    """

    def __init__(self, prompter: Prompter, context: int, ends: Set[int]) -> None:
        self.prompter = prompter
        self.context = context
        self.ends = ends

    def complete(
        self,
        rows: Sequence[Sequence[int]],
        settings: GenerationOptions,
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
        for index, ids in enumerate(rows):
            require_room(len(ids), self.context, "The prompt" if len(rows) == 1 else f"Prompt {index + 1}")

        def made(index: int, ids: Sequence[int]) -> Row:
            text = TextStream(self.prompter.tokenizer, settings.stop, lambda piece: on_text(index, piece))
            limit = min(settings.max_new_tokens, self.context - len(ids))
            return Row(index, numbers[index] if numbers else index, ids, limit, self.ends, text, Completion(len(ids)))

        work = [made(index, ids) for index, ids in enumerate(rows)]
        try:
            self._generate(work, settings.sampling, lambda row: on_done(row.index, row.completion))
        except KeyboardInterrupt:
            if all(row.done for row in work):
                raise  # too late for these rows, but whoever brings more must hear of it
            for row in work:
                row.interrupt()
        return [row.completion for row in work]

    @abstractmethod
    def _generate(self, work: Sequence[Row], sampling: Sampling, on_done: Callable[[Row], None]) -> None:
        """Begin every row and give it tokens until it is done; tell `on_done` of each then. Ctrl-C is passed on."""


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
    return read_json(path, CORRECT) if path.is_file() else {}


def context_of(checkpoint: Checkpoint) -> int:
    return int(checkpoint.facts.max_position_embeddings)


def end_tokens(checkpoint: Checkpoint, prompter: Prompter) -> set[int]:
    """The model's end tokens: the generation config's, the tokenizer's, and the end of a chat turn."""
    declared = generation_config(checkpoint).get("eos_token_id")
    ends = declared if isinstance(declared, list) else [] if declared is None else [declared]
    shown = repr(declared)[:80]
    for token in ends:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < checkpoint.vocabulary:
            raise GemmaAwqError(
                f"The model's {GENERATION_CONFIG} has the eos_token_id {shown}, and its tokens are "
                f"numbered from 0 to {checkpoint.vocabulary - 1}.",
                CORRECT,
            )
    own = [prompter.tokenizer.special_id("eos_token")]
    if prompter.is_chat:
        own.append(prompter.tokenizer.id_of(checkpoint.family.end_of_turn))
    # a token that the model has no embedding of is never generated
    return {*ends, *(token for token in own if token is not None and token < checkpoint.vocabulary)}
