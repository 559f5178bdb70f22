"""The model of a request, found on this machine or fetched, and its tokenizer, which begins to load. Imports no torch.

The tokenizer loads on a thread of its own, while the weights are packed.
"""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from gemma_awq_cli.models.checkpoints.source import find_source
from gemma_awq_cli.models.text.prompter import Prompter, begin_loading


@dataclass(frozen=True)
class FoundModel:
    """A model folder on this machine, and its tokenizer and chat template while they load."""

    folder: Path
    prompter: Future[Prompter]


def find_model(name: str, revision: str | None, note: Callable[[str], None], one_text: bool = False) -> FoundModel:
    """Find a folder, a hub id or `demo`, and begin to load its tokenizer. `note` is told of what takes long.

    one_text: whether the model will get a single prompt.
    """
    folder = find_source(name, revision, note).folder
    return FoundModel(folder, begin_loading(folder, one_text))
