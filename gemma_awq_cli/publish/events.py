"""What `push` reports while it works."""

from dataclasses import dataclass

from gemma_awq_cli.events import Note


@dataclass(frozen=True)
class MeasuringStarted:
    """The deep check begins. steps: how many `MeasuringStep` follow."""

    steps: int


@dataclass(frozen=True)
class MeasuringStep:
    """One step of the deep check is done."""


@dataclass(frozen=True)
class MeasuringFinished:
    """The deep check has measured everything."""


@dataclass(frozen=True)
class UploadStarted:
    """The user agreed; from here on the hub may receive files."""


Event = Note | MeasuringStarted | MeasuringStep | MeasuringFinished | UploadStarted
