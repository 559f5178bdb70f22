"""What a bench reports while it runs."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

from gemma_awq_cli.events import Note, Warned


@dataclass(frozen=True)
class StageStarted:
    """A stage begins, and the one before it has ended."""

    title: str


@dataclass(frozen=True)
class Progress:
    """How many of the stage's steps are done."""

    done: int
    total: int


@dataclass(frozen=True)
class Measured:
    """The document: all that was measured, or, if it says that it is not complete, all until an interruption."""

    document: dict[str, Any]


Event = Note | Warned | StageStarted | Progress | Measured
OnEvent = Callable[[Event], None]
OnProgress = Callable[[int, int], None]  # done, total


def counted(total: int, on_progress: OnProgress) -> Callable[[], None]:
    """Return a function that reports one step more of `total` each time it is called."""
    done = count(1)
    return lambda: on_progress(next(done), total)
