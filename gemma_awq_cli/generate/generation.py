"""The generation of text from rows of token ids, handed out piece by piece as each piece becomes certain.

An `Engine` continues rows; a single prompt, a chat and a batch are all built on it. `local_engine.py` has this tool's
own engine, `vllm_engine.py` has vLLM's. Imports no torch.
"""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence, Set
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.generate.grammar import Grammar
from gemma_awq_cli.generate.sampling import Sampling
from gemma_awq_cli.models.text.prompter import Prompter
from gemma_awq_cli.models.text.thoughts import TurnDetokenizer
from gemma_awq_cli.models.text.tokenizer import Tokenizer
from gemma_awq_cli.models.text.tool_calls import ToolCall, ToolFormat


@dataclass(frozen=True)
class GenerationOptions:
    """How rows are continued, by whichever engine.

    max_new_tokens: the most tokens that a row is given. sampling: how each token is chosen. stop: strings; a row ends
    before the first that its text, which thoughts are no part of, would contain. logprobs: of how many of the most
    likely tokens the log probabilities are recorded, beside the chosen one's; None: nothing is. grammar: what every
    answer must match, unless its limit or a stop string ends it earlier. tools: how the model calls tools, if it may;
    most_calls: after how many calls a row ends, None for any number.
    """

    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: Sequence[str] = ()
    logprobs: int | None = None
    grammar: Grammar | None = None
    tools: ToolFormat | None = None
    most_calls: int | None = None


@dataclass(frozen=True)
class TokenLogprobs:
    """The natural logarithms of probabilities at one token, in the model's own distribution: no setting changes them.

    top: (token, logprob) of the most likely tokens, in descending order.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass
class Completion:
    """The text that was generated for one prompt.

    prompt_tokens: length of the prompt, BOS included. tokens: ids of the generated tokens, an end token included. text:
    the tokens as text, without special tokens and cut before a stop string. thinking: what the model thought before it
    answered, which is not in `text`. finish: `stop` (an end token or a stop
    string), `length` (the limit or the end of the context) or `interrupted` (Ctrl-C). read_tokens: how many of the
    prompt's tokens had to be read; the others were in the cache of an earlier turn. prefill_seconds: time to the first
    token. decode_seconds: time from the first token to the last. logprobs: of each token, if they were asked for.
    calls: the tools that it asks for, which are not in `text`. drafted_tokens, accepted_tokens: how many tokens were
    guessed before the model had to say them, and how many of these guesses were right.
    """

    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    thinking: str = ""
    finish: str = "length"
    read_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    def count_draft(self, drafted: int, accepted: int) -> None:
        """Count a draft of `drafted` tokens, of which `accepted` were right."""
        self.drafted_tokens += drafted
        self.accepted_tokens += accepted

    @property
    def texts(self) -> dict[str, str]:
        """The text and, if there are any, the thoughts before it, by their names in a document."""
        return {"text": self.text, **({"thinking": self.thinking} if self.thinking else {})}

    @property
    def call_documents(self) -> dict[str, Any]:
        """The calls by their name in a document; empty if there are none."""
        calls = [{"name": call.name, "arguments": json.loads(call.arguments)} for call in self.calls]
        return {"tool_calls": calls} if calls else {}

    def logprob_documents(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """The log probabilities by their name in a document: those of each token, thoughts and end included, in order.

        Empty if none were asked for.
        """
        if not self.logprobs:
            return {}

        def named(token: int, logprob: float) -> dict[str, Any]:
            return {"token": tokenizer.text_of(token), "id": token, "logprob": logprob}

        documents = [
            {**named(each.token, each.logprob), "top": [named(*other) for other in each.top]} for each in self.logprobs
        ]
        return {"logprobs": documents}

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens/s up to the first new token; 0 if none was generated."""
        return self.read_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """New tokens/s after the first, which comes out of the prefill; 0 if there are no more."""
        return (len(self.tokens) - 1) / self.decode_seconds if self.decode_seconds and len(self.tokens) > 1 else 0.0


@dataclass(eq=False)
class Row:
    """One row while it is generated.

    index: its position among the rows of the call. number: see `Engine.complete`. limit: the most tokens that it may be
    given. ends: the tokens that end it. logprobs: see `GenerationOptions`.
    """

    index: int
    number: int
    ids: Sequence[int]
    limit: int
    ends: Set[int]
    text: TurnDetokenizer
    completion: Completion
    logprobs: int | None = None
    done: bool = False
    _started: float = 0.0

    def begin(self, read_tokens: int) -> None:
        """Start the clock. read_tokens: how many tokens of the prompt the engine has to read."""
        self.completion.read_tokens = read_tokens
        self._started = time.perf_counter()

    def take(self, token: int) -> None:
        """Append the next token, which may end the row."""
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
            self._finish()

    def interrupt(self) -> None:
        """End the row as it is, unless it has ended already."""
        if not self.done:
            self.completion.finish = "interrupted"
            self._finish()

    def _finish(self) -> None:
        self.completion.text, self.completion.thinking = self.text.finish()
        self.completion.calls = self.text.calls


class TextStream(Iterator[str]):
    """The text of one row, piece by piece while it is generated; without thoughts and calls.

    completion: of the row; it is whole when the iterator has ended.
    """

    def __init__(self, pieces: Generator[str, None, None], completion: Completion) -> None:
        self.completion = completion
        self._pieces = pieces

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Stop generating."""
        self._pieces.close()


class Engine(ABC):
    """Continues rows of token ids with one model.

    prompter: the model's tokenizer and chat template. context: the most tokens of a row, prompt and answer together.
    ends: the tokens that end a row.
    """

    def __init__(self, prompter: Prompter, context: int, ends: Set[int]) -> None:
        self.prompter = prompter
        self.context = context
        self.ends = ends

    def complete(
        self,
        rows: Sequence[Sequence[int]],
        options: GenerationOptions,
        on_text: Callable[[int, str], None] = lambda index, piece: None,
        on_done: Callable[[int, Completion], None] = lambda index, completion: None,
        numbers: Sequence[int] | None = None,
        on_thought: Callable[[int, str], None] = lambda index, piece: None,
    ) -> list[Completion]:
        """Continue each row until it ends, has `max_new_tokens` new tokens or fills the context.

        rows: token ids, BOS included. on_text: called with (index of the row, piece of text); the pieces of a row make
        up its text. on_done: called with (index, completion) as soon as a row ends by itself. numbers: one number per
        row that tells its random numbers from those of other rows, by default 0, 1, ...; a row's tokens depend on its
        own number alone, whatever other rows run beside it. on_thought: as on_text, of the row's thoughts.

        Ctrl-C ends the unfinished rows and keeps their text; if all rows are finished, KeyboardInterrupt is raised.
        Raises GemmaAwqError if a prompt fills the context.
        """
        work = self._rows(rows, options, on_text, on_thought, numbers)
        try:
            with closing(self._steps(work, options, lambda row: on_done(row.index, row.completion))) as steps:
                for _ in steps:
                    pass
        except KeyboardInterrupt:
            if all(row.done for row in work):
                raise  # too late for these rows, but a caller that brings more has to know
            for row in work:
                row.interrupt()
        return [row.completion for row in work]

    def stream(
        self,
        ids: Sequence[int],
        options: GenerationOptions,
        on_thought: Callable[[str], None] = lambda piece: None,
    ) -> TextStream:
        """Return an iterator over the text of one row, piece by piece while it is generated.

        ids: token ids, BOS included. on_thought: called with each piece of the thoughts before the text. Nothing is
        generated until the first piece is asked for.
        """
        pieces: list[str] = []
        work = self._rows(
            [ids], options, lambda _, piece: pieces.append(piece), lambda _, piece: on_thought(piece), None
        )

        def generate() -> Generator[str, None, None]:
            with closing(self._steps(work, options, lambda row: None)) as steps:
                for _ in steps:
                    yield from pieces
                    pieces.clear()
            yield from pieces

        return TextStream(generate(), work[0].completion)

    def _rows(
        self,
        rows: Sequence[Sequence[int]],
        options: GenerationOptions,
        on_text: Callable[[int, str], None],
        on_thought: Callable[[int, str], None],
        numbers: Sequence[int] | None,
    ) -> list[Row]:
        for index, ids in enumerate(rows):
            require_room(len(ids), self.context, "The prompt" if len(rows) == 1 else f"Prompt {index + 1}")

        ends = with_tool_ends(self.ends, self.prompter.tokenizer, options.tools)

        def new(index: int, ids: Sequence[int]) -> Row:
            text = TurnDetokenizer(
                self.prompter.tokenizer,
                options.stop,
                lambda piece: on_text(index, piece),
                lambda piece: on_thought(index, piece),
                options.tools,
                options.most_calls,
            )
            limit = min(options.max_new_tokens, self.context - len(ids))
            number = numbers[index] if numbers else index
            return Row(index, number, ids, limit, ends, text, Completion(len(ids)), options.logprobs)

        return [new(index, ids) for index, ids in enumerate(rows)]

    @abstractmethod
    def _steps(
        self, rows: Sequence[Row], options: GenerationOptions, on_done: Callable[[Row], None]
    ) -> Generator[None, None, None]:
        """Begin every row and give it tokens until it is done, then call `on_done` with it.

        Yields after each step, at which some of the rows have got one token more. Passes KeyboardInterrupt on.
        """


def with_tool_ends(ends: Set[int], tokenizer: Tokenizer, tools: ToolFormat | None) -> Set[int]:
    """Return the tokens that end a row, with the one after which a model expects the results of its calls."""
    waits = tokenizer.id_of(tools.ends) if tools is not None and tools.ends else None
    return ends if waits is None else {*ends, waits}


def require_room(length: int, context: int, what: str = "The prompt") -> None:
    """Raise GemmaAwqError if a prompt of `length` tokens leaves no room for an answer."""
    if length >= context:
        raise GemmaAwqError(f"{what} has {length} tokens; this model's context holds {context}.", "Shorten it.")
