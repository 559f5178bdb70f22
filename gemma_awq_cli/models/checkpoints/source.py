"""Finding a model: a local folder, a hub repository or the demo. The result is always a local folder."""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.models.checkpoints.files import CONFIG
from gemma_awq_cli.models.checkpoints.foreign import (
    ADAPTER_CONFIG,
    FILE_SUFFIXES,
    explain_file,
    explain_no_adapter,
    explain_no_config,
)
from gemma_awq_cli.models.checkpoints.hub import REPO_ID, fetch_errors
from gemma_awq_cli.system.failures import system_errors
from gemma_awq_cli.system.reading import home_path

if TYPE_CHECKING:
    from gemma_awq_cli.models.checkpoints.hub_headers import HubWeights

DEMO = "demo"
_GIVE = "Give a checkpoint folder or a hub id"
_GIVE_ADAPTER = "Give --adapter the folder or the hub id of an adapter that PEFT saved"
# Other weights than safetensors, and exports for frameworks, stay on the hub.
_HUB_WEIGHTS = "*.safetensors"
_HUB_FILES = [
    "*.json", "*.jinja", "*.model", "*.txt", "*.md", "LICENSE*", "NOTICE*", "Notice*", "*TERMS*",
]  # fmt: skip

# Of an adapter's repository: it may hold the merged model and checkpoints of the training, too.
_ADAPTER_FILES = [
    "adapter_*", "adapters.safetensors", "README.md", "*.jinja", "tokenizer*", "LICENSE*", "NOTICE*", "Notice*",
]  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A model on this machine: its folder, the user's name for it, and a short name for files made from it.

    revision: the commit of a hub repository, even if the user named a branch or nothing; on_hub: its weights, if they
    have not been fetched.
    """

    folder: Path
    asked: str
    name: str
    revision: str | None = None
    on_hub: "HubWeights | None" = None


def find_source(asked: str, revision: str | None, note: Callable[[str], None], weights: bool = True) -> Source:
    """The local folder of a MODEL argument, fetched or made if necessary. `note` gets a line before long work.

    weights: whether the weights of a hub repository are fetched; if not, those that are not there stay on the hub.
    """
    if asked == DEMO:  # a folder of that name is ./demo
        if revision:
            raise UsageError("--revision only applies to a hub id; the demo model has no revisions.")
        from gemma_awq_cli.models.checkpoints.demo import NAME, demo_checkpoint

        return Source(demo_checkpoint(note), DEMO, NAME)
    path, mode = locate(asked)
    if stat.S_ISDIR(mode):
        if revision:
            raise UsageError(f"--revision only applies to a hub id; {asked} is a local folder.")
        if not (path / CONFIG).is_file():
            raise explain_no_config(path)
        return Source(path, asked, path.resolve().name)
    if mode:
        raise explain_file(path, asked)
    with as_hub_id(asked, path):
        folder = _fetch(asked, revision, [_HUB_WEIGHTS, *_HUB_FILES] if weights else _HUB_FILES)
    if not (folder / CONFIG).is_file():  # a repository of GGUF files or adapters, say
        if (folder / ADAPTER_CONFIG).is_file():
            raise explain_no_config(folder, asked)
        raise GemmaAwqError(f"{asked} has no {CONFIG} on the hub.", "Give a repository with a safetensors checkpoint.")
    commit = folder.name
    on_hub = None if weights or _has_weights(folder) else _weights_on_hub(asked, commit)
    return Source(folder, asked, asked.split("/")[1], commit, on_hub)


def locate(asked: str) -> tuple[Path, int]:
    """The path that a MODEL argument names on this machine, and the mode of the file there; 0 if there is none."""
    if not asked.strip():
        raise UsageError("The MODEL is empty.", f"{_GIVE}, or demo.")
    path = _path_of(asked)
    return path, _mode(path, asked)


@contextmanager
def as_hub_id(asked: str, path: Path) -> Iterator[None]:
    """Around what asks the hub for a MODEL: an error if it cannot be a hub id, or if it may be a misspelt folder.

    path: the one that `locate` gave.
    """
    if not REPO_ID.fullmatch(asked) or path.suffix.lower() in FILE_SUFFIXES:
        known = f"is neither a folder nor a hub id{_like(path)}"
        raise GemmaAwqError(f"{_short(asked)!r} {known}.", f"{_GIVE}, such as google/gemma-3-1b-it, or demo.")
    try:
        yield
    except GemmaAwqError as error:
        if not path.parent.is_dir():
            raise
        # a misspelt folder of this machine is as likely as a hub id
        raise GemmaAwqError(
            f"There is no folder {asked} here{_like(path)}. As a hub id: {error.message}",
            f"Correct the folder's name. If a model on the hub is meant: {error.hint}",
        ) from None


def find_adapter(asked: str, revision: str | None) -> Source:
    """The local folder of an adapter, fetched if necessary. It holds an adapter_config.json."""
    if not asked.strip():
        raise UsageError("The name of the adapter is empty.", f"{_GIVE_ADAPTER}.")
    path = _path_of(asked, _GIVE_ADAPTER)
    mode = _mode(path, asked, _GIVE_ADAPTER)
    if stat.S_ISDIR(mode):
        if revision:
            raise UsageError(f"--adapter-revision only applies to a hub id; {asked} is a local folder.")
        if not (path / ADAPTER_CONFIG).is_file():
            raise explain_no_adapter(path)
        return Source(path, asked, path.resolve().name)
    if mode:
        raise GemmaAwqError(f"{_short(asked)} is a file.", f"{_GIVE_ADAPTER}, not a file in it.")
    if not REPO_ID.fullmatch(asked) or path.suffix.lower() in FILE_SUFFIXES:
        raise GemmaAwqError(f"{_short(asked)!r} is neither a folder nor a hub id{_like(path)}.", f"{_GIVE_ADAPTER}.")
    folder = _fetch(asked, revision, _ADAPTER_FILES)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise GemmaAwqError(f"{asked} has no {ADAPTER_CONFIG} on the hub.", f"{_GIVE_ADAPTER}.")
    return Source(folder, asked, asked.split("/")[1], folder.name)


def _path_of(asked: str, give: str = _GIVE) -> Path:
    path = home_path(asked)
    if path.parts[:1] and path.parts[0].startswith("~"):
        user = _short(path.parts[0][1:])
        raise GemmaAwqError(f"{_short(asked)} cannot be looked up: there is no user {user}.", f"{give}.")
    return path


def _mode(path: Path, asked: str, give: str = _GIVE) -> int:
    """The mode of the file at a path, links followed; 0 if there is none."""
    with system_errors(_short(asked), f"{give}.", "looked up"):  # no permission, or too long for a name
        try:
            return path.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            if not path.is_symlink():
                return 0
            raise


def _like(path: Path) -> str:
    """A suggestion for an error: the folder whose name is most like that of a path that does not exist."""
    try:
        close = get_close_matches(path.name, os.listdir(path.parent), 5)
    except OSError:
        return ""
    found = next((name for name in close if (path.parent / name).is_dir()), None)
    return f" (did you mean {path.parent / found}?)" if found else ""


def _short(asked: str) -> str:
    return asked if len(asked) <= 100 else f"{asked[:100]}..."


def _fetch(repo: str, revision: str | None, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    with fetch_errors(repo, revision):
        return Path(snapshot_download(repo, revision=revision, allow_patterns=files))


def _weights_on_hub(repo: str, commit: str) -> "HubWeights":
    from gemma_awq_cli.models.checkpoints.hub_headers import weights_on_hub  # it imports safetensors

    return weights_on_hub(repo, commit)


def _has_weights(folder: Path) -> bool:
    """Whether a complete set of weights lies in the folder, from an earlier fetch."""
    from gemma_awq_cli.models.checkpoints.headers import find_weights

    try:
        return bool(find_weights(folder).files)
    except GemmaAwqError:
        return False
