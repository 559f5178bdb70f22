"""The events that `export` reports while it works."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gemma_awq_cli.events import Note, Warned


@dataclass(frozen=True)
class ExportPlanned:
    """Everything is checked, and writing begins. nbytes: of the files that will be written."""

    source: str
    target: Path
    format: str
    nbytes: int


@dataclass(frozen=True)
class PartsStarted:
    """The first of `parts` parts begins. verifying: parts are read back, not written. One `PartDone` follows each."""

    parts: int
    verifying: bool


@dataclass(frozen=True)
class PartDone:
    """Part `index` of `parts`, counted from 0, is on the disk, or was read back.

    resumed: an interrupted run had written it.
    """

    index: int
    parts: int
    resumed: bool = False


Event = Note | Warned | ExportPlanned | PartsStarted | PartDone
OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The `OnEvent` of a caller that shows nothing."""
