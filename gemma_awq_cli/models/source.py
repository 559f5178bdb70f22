"""Where a model comes from: a local folder, a hub repository, or the embedded demo. Ends in a local folder."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.models.files import CONFIG
from gemma_awq_cli.models.hub import REPO_ID, fetch_errors

DEMO = "demo"
# Weights other than safetensors, and framework exports, stay on the hub.
_HUB_FILES = [
    "*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.md", "LICENSE*", "NOTICE*", "Notice*", "*TERMS*",
]  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A model on this machine: the folder, what the user called it, and a short name for files made from it.

    revision: the commit of a hub repository, however it was asked for.
    """

    folder: Path
    asked: str
    name: str
    revision: str | None = None


def find_source(asked: str, revision: str | None, note: Callable[[str], None]) -> Source:
    """The local folder of a MODEL argument, fetched or made if need be. `note` is told what takes long."""
    if asked == DEMO:  # a folder of that name is ./demo
        if revision:
            raise UsageError("--revision goes with a hub id, and the demo model has none.")
        from gemma_awq_cli.models.demo import NAME, demo_checkpoint

        return Source(demo_checkpoint(note), DEMO, NAME)
    try:
        path = Path(asked).expanduser()
        is_folder, is_there = path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:  # no permission, too long for a name, the home of nobody
        raise GemmaAwqError(f"{asked} cannot be looked up: {error}.", "Give another folder, or a hub id.") from None
    if is_folder:
        if revision:
            raise UsageError(f"--revision goes with a hub id, and {asked} is a local folder.")
        if not (path / CONFIG).is_file():
            raise GemmaAwqError(f"{path} has no {CONFIG}.", "Give a folder that holds a Hugging Face checkpoint.")
        return Source(path, asked, path.resolve().name)
    if is_there:
        raise GemmaAwqError(f"{asked} is a file.", "Give the folder that holds the checkpoint, not a file in it.")
    if not REPO_ID.fullmatch(asked):
        raise GemmaAwqError(
            f"{asked!r} is neither a folder nor a hub id.",
            "Give a checkpoint folder, a hub id such as google/gemma-3-1b-it, or demo.",
        )
    folder = _fetch(asked, revision)
    if not (folder / CONFIG).is_file():  # a repository of GGUF files or adapters, say
        raise GemmaAwqError(f"{asked} has no {CONFIG} on the hub.", "Give a repository with a safetensors checkpoint.")
    return Source(folder, asked, asked.split("/")[1], folder.name)


def _fetch(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    with fetch_errors(repo, revision):
        return Path(snapshot_download(repo, revision=revision, allow_patterns=_HUB_FILES))
