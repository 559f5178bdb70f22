"""What a server reports to its operator while it runs."""

from collections.abc import Callable
from dataclasses import dataclass

from gemma_awq_cli.generate.events import Event as OpeningEvent


@dataclass(frozen=True)
class Listening:
    """Requests are taken. url: where, without a path; name: of the model."""

    url: str
    name: str


@dataclass(frozen=True)
class RequestFailed:
    """A request failed through no fault of its own, and others go on."""

    error: Exception


@dataclass(frozen=True)
class Finishing:
    """No more requests are taken; rows that run or wait are finished."""

    rows: int


Event = OpeningEvent | Listening | RequestFailed | Finishing
OnEvent = Callable[[Event], None]
