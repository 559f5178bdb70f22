"""Finding what is on the disk: where the user looks, what this tool remembers, and both caches."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.inventory.entries import Entry, Kind
from gemma_awq_cli.inventory.folders import entries_in, entry_of, measured
from gemma_awq_cli.models.checkpoints.cache import cache_folder, remembered_folders
from gemma_awq_cli.models.checkpoints.files import CONFIG, read_json
from gemma_awq_cli.models.checkpoints.hub import REPO_ID
from gemma_awq_cli.models.gemma.families import FAMILIES
from gemma_awq_cli.system.failures import system_errors
from gemma_awq_cli.system.reading import home_path

CACHE_PREFIX = "cache:"
# A part of the cache -> what it is.
PARTS = {
    "native": "compiled kernels, made again at their next use",
    "own-rows": "text that models wrote for `--calibration self`",
}
MODELS = "models"  # the part that has a folder for each model
_OF_MODEL = "a 16-bit model, made again at its next use"


def find_in(folders: Iterable[str]) -> list[Entry]:
    """Return the artifacts, exports and unfinished work in folders, or which these are. Raises if one is missing."""
    found: list[Entry] = []
    for name in folders:
        folder = home_path(name)
        with system_errors(folder, "Give a folder that you can read."):
            os.listdir(folder)
        found += entries_in(folder)
    return found


def find_all() -> list[Entry]:
    """Return everything: what is in the current folder, what this tool remembers writing, and both caches."""
    return [*written(), *cached(), *hub_models()]


def list_artifacts() -> list[Path]:
    """Return the folders of the artifacts in the current folder, and of those that this tool remembers writing.

    A folder whose report cannot be read is left out. Reads no weights.
    """
    return [entry.path for entry in written() if entry.kind is Kind.artifact and entry.problem is None]


def written() -> Iterator[Entry]:
    """Yield what is in the current folder, and what this tool remembers writing, the latest first."""
    known = set()
    for entry in entries_in(Path(".")):
        known.add(entry.path.resolve())
        yield entry
    for folder in remembered_folders():
        if folder not in known and (found := entry_of(folder, str(folder))) is not None:
            yield found


def find(name: str) -> Entry:
    """Return what the user names: a folder, a part of the cache, or a model in the hub's cache."""
    if name.startswith(CACHE_PREFIX):
        found = next((entry for entry in cached() if entry.name == name), None)
        if found is None:
            raise GemmaAwqError(f"The cache has no {name}.", "`gemma-awq list` shows what there is.")
        return found
    path = home_path(name)
    if path.is_symlink():
        raise GemmaAwqError(f"{name} is a link.", f"Name the folder that it leads to: {os.path.realpath(path)}.")
    if (entry := entry_of(path, name)) is not None:
        return entry
    if (entry := next((each for each in cached() if path.exists() and each.path.samefile(path)), None)) is not None:
        return entry
    if path.exists():
        raise GemmaAwqError(
            f"{name} is not a folder that this tool wrote.",
            "It has neither quantization_report.json nor export.json. `gemma-awq inspect` says what a model is.",
        )
    if REPO_ID.fullmatch(name) and (entry := next((each for each in hub_models() if each.name == name), None)):
        return entry
    raise GemmaAwqError(f"There is nothing named {name} here.", "`gemma-awq list` shows what there is.")


def cached() -> Iterator[Entry]:
    """Yield the parts of this tool's cache."""
    root = cache_folder()
    for part, about in PARTS.items():
        if (root / part).is_dir() and not (root / part).is_symlink():
            yield Entry(Kind.cache, CACHE_PREFIX + part, root / part, *measured([root / part]), {"about": about})
    models = root / MODELS
    if models.is_dir() and not models.is_symlink():
        for path in sorted(models.iterdir()):
            if path.is_dir() and not path.is_symlink():
                yield Entry(Kind.cache, CACHE_PREFIX + path.name, path, *measured([path]), {"about": _OF_MODEL})


def hub_models() -> Iterator[Entry]:
    """Yield the Gemma models in the hub's cache, of which the weights need not be complete."""
    from huggingface_hub.constants import HF_HUB_CACHE

    root = Path(HF_HUB_CACHE)
    if not root.is_dir():
        return
    for path in sorted(root.glob("models--*--*")):
        facts = _of_hub_model(path)
        if facts is not None and not path.is_symlink():
            name = path.name.removeprefix("models--").replace("--", "/", 1)
            yield Entry(Kind.hub, name, path, *measured([path]), facts)


def _of_hub_model(path: Path) -> dict[str, Any] | None:
    """The facts of a repository in the hub's cache; None if it is no Gemma."""
    for config in sorted(path.glob(f"snapshots/*/{CONFIG}")):
        try:
            values = read_json(config)
        except GemmaAwqError:
            continue
        if values.get("model_type") in FAMILIES:
            return {"family": values["model_type"], "quantized": isinstance(values.get("quantization_config"), dict)}
    return None
