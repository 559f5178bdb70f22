"""What `run` reports while it works: small records that a caller may show. Imports nothing heavy."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gemma_awq_cli.events import Note, Warned
from gemma_awq_cli.generate.generation import Completion
from gemma_awq_cli.generate.sampling import Sampling


@dataclass(frozen=True)
class SamplingChosen:
    """How the tokens will be sampled."""

    sampling: Sampling


@dataclass(frozen=True)
class ModelOpened:
    """This tool's own engine has opened the model.

    kernels: which kernel runs each kind of linear and why others do not, a line each. slow: why the model runs more
    slowly than it could, or None.
    """

    device: str
    kernels: tuple[str, ...]
    slow: str | None


@dataclass(frozen=True)
class StageEnded:
    """A stage of the way to the first token is over."""

    stage: str


@dataclass(frozen=True)
class BatchResumed:
    """How many of the prompts an earlier run has completed."""

    finished: int
    total: int
    output: Path


@dataclass(frozen=True)
class BatchStarted:
    """The engine is open and the first prompts begin. finished: as in `BatchResumed`."""

    finished: int
    total: int


@dataclass(frozen=True)
class PromptCompleted:
    """The completion of one prompt is in the output. index: the prompt's position in the input, from 0."""

    index: int
    completion: Completion


@dataclass(frozen=True)
class BatchStopped:
    """The run ended, by Ctrl-C or an error, before all prompts were completed. finished: by this and earlier runs."""

    finished: int
    total: int
    output: Path


Event = (
    Note
    | Warned
    | SamplingChosen
    | ModelOpened
    | StageEnded
    | BatchResumed
    | BatchStarted
    | PromptCompleted
    | BatchStopped
)
OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The `OnEvent` of a caller that shows nothing."""
