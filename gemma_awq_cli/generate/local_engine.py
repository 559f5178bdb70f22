"""This tool's own engine: rows in the places of a session, and a new prompt in a place as soon as its row has ended.

It knows a model by its sessions only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.generate.generation import Completion, Engine, GenerationOptions, Row, context_of, end_tokens
from gemma_awq_cli.generate.sampling import Chooser, Sampling
from gemma_awq_cli.models.forward.loading import OpenModel
from gemma_awq_cli.models.forward.memory import memory_errors
from gemma_awq_cli.models.forward.session import Session

KEPT_TOKENS = 512  # the least that a session which waits for further turns has room for
SMALLER = "Use fewer tokens (--max-new-tokens, a shorter prompt), fewer prompts at once (--batch-size), or 4 bits."


def complete(
    opened: OpenModel,
    ids: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    stop: Sequence[str],
    on_text: Callable[[str], None],
) -> Completion:
    """Continue one prompt's token ids. `on_text` is given each piece of text once."""
    settings = GenerationOptions(max_new_tokens, sampling, stop)
    return LocalEngine(opened).complete([ids], settings, lambda _, piece: on_text(piece))[0]


@dataclass
class _Live:
    """A session of one row that waits for the next turn, and what it has read."""

    session: Session
    capacity: int
    read: list[int]


@dataclass
class _Place:
    """A row of a session with the row that it holds, what chooses its tokens and what it is to be fed next."""

    row: Row
    chooser: Chooser
    step: Sequence[int]


class LocalEngine(Engine):
    """Generates with this tool's own sessions.

    at_once: the most rows that run at a time. keep: hold the session of a single row, so that a prompt that goes on
    where it ended feeds only the new tokens.
    """

    def __init__(self, opened: OpenModel, at_once: int = 8, keep: bool = False) -> None:
        super().__init__(opened.prompter, context_of(opened.checkpoint), end_tokens(opened.checkpoint, opened.prompter))
        self._opened = opened
        self._at_once = at_once
        self._keep = keep
        self._live: _Live | None = None

    @torch.inference_mode()
    def _generate(self, work: Sequence[Row], sampling: Sampling, on_done: Callable[[Row], None]) -> None:
        """See `Engine`."""
        waiting = list(work)
        try:
            with memory_errors("generating", SMALLER):
                if self._keep and len(waiting) == 1:
                    self._go_on(waiting.pop(), sampling, on_done)
                while waiting:
                    # no more memory than these rows need: a longer one that waits gets a session of its own
                    first = waiting[: self._at_once]
                    self._run(waiting, len(first), max(map(_needed, first)), sampling, on_done)
        except BaseException:
            self._live = None  # the cache may be half-way through a token
            raise

    def _run(
        self,
        waiting: list[Row],
        count: int,
        capacity: int,
        sampling: Sampling,
        on_done: Callable[[Row], None],
    ) -> None:
        """A new session of `count` rows: take out of `waiting` what fits it, until nothing is left or fits."""
        session = self._opened.session(count, capacity)
        places: list[_Place | None] = [None] * count
        fresh = True
        while True:
            for index in range(count):
                fitting = next((row for row in waiting if _needed(row) <= capacity), None)
                if fitting is not None and places[index] is None and (fresh or session.independent_rows):
                    if not fresh:
                        session.reset_row(index)
                    waiting.remove(fitting)
                    places[index] = _begin(fitting, fitting.ids, sampling)
            fresh = False
            going = [place for place in places if place is not None]
            if not going:
                return
            logits = session.next_logits([place.step if place is not None else [] for place in places])
            require_numbers(logits)
            for index, place in enumerate(places):
                if place is not None:
                    _advance(place, logits[going.index(place)])
                    if place.row.done:
                        places[index] = None
                        on_done(place.row)

    def _go_on(self, row: Row, sampling: Sampling, on_done: Callable[[Row], None]) -> None:
        """A single row in the session that is kept, if it continues what was read there; else in a new one."""
        live, self._live = self._live, None
        read = len(live.read) if live else 0
        if (
            live is None
            or _needed(row) > live.capacity
            or not 0 < read < len(row.ids)
            or live.read != list(row.ids[:read])
        ):
            capacity = min(self.context, max(2 * _needed(row), KEPT_TOKENS))  # room for the next turns
            live = _Live(self._opened.session(1, capacity), capacity, [])
        place = _begin(row, row.ids[len(live.read) :], sampling)
        while not row.done:
            logits = live.session.next_logits([place.step])
            live.read += place.step
            require_numbers(logits)
            _advance(place, logits[0])
        self._live = live
        on_done(row)


def _needed(row: Row) -> int:
    """Tokens that its place must have room for."""
    return len(row.ids) + row.limit


def _begin(row: Row, step: Sequence[int], sampling: Sampling) -> _Place:
    row.begin(len(step))
    return _Place(row, Chooser(sampling, row.number, row.ids), step)


def _advance(place: _Place, logits: Tensor) -> None:
    """Choose the row's next token from logits [V]."""
    token = place.chooser.choose(logits)
    place.step = [token]
    place.row.take(token)


def require_numbers(logits: Tensor) -> None:
    """An error if any logit is NaN or infinite: what it would be turned into is `<pad>` text."""
    # the least and the largest tell it, and take a twentieth of the time of a look at each
    if not all(torch.isfinite(torch.stack(torch.aminmax(logits)))):
        raise GemmaAwqError(
            "The model's output is NaN or infinite.",
            "If you gave --dtype float16, give bfloat16: its range is wider. Otherwise the weights are damaged.",
        )
