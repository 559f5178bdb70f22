"""The tool's cache folder, and the artifact that was written last, remembered between commands."""

import json
import os
from pathlib import Path
from typing import Any

import platformdirs

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.system.failures import reason_of
from gemma_awq_cli.system.reading import read_bytes
from gemma_awq_cli.system.saving import local_path, write_whole

_REMEMBERED_BYTES = 100_000
_REMEMBERED = 100  # folders
ENVIRONMENT = "GEMMA_AWQ_CACHE"


def cache_folder() -> Path:
    """The folder that `GEMMA_AWQ_CACHE` names; by default `gemma-awq` in the user's cache folder. Not created here."""
    configured = os.environ.get(ENVIRONMENT)
    if not configured:
        return Path(platformdirs.user_cache_dir("gemma-awq", False))
    return local_path(Path(configured), f"set {ENVIRONMENT} to another folder")


def _last_artifact_file() -> Path:
    return cache_folder() / "last-artifact.json"


def remember_artifact(folder: Path) -> str | None:
    """Make `folder` the default model of later commands. Returns the reason if that failed; the artifact is whole."""
    return _remember(folder, is_last=True)


def remember_folder(folder: Path) -> str | None:
    """Remember a folder that this tool wrote, to list it. Returns the reason if that failed."""
    return _remember(folder, is_last=False)


def last_artifact() -> Path | None:
    """The last artifact written, which may have been moved since; None if none is remembered or the note is damaged."""
    return _usable(_note().get("artifact"))


def remembered_folders() -> list[Path]:
    """The folders that this tool wrote, the latest first, of which some may be gone."""
    kept = _note().get("folders")
    return [path for name in (kept if isinstance(kept, list) else []) if (path := _usable(name)) is not None]


def _remember(folder: Path, is_last: bool) -> str | None:
    path, written = _last_artifact_file(), folder.resolve()
    before = [other for other in remembered_folders() if other != written]
    last = written if is_last else last_artifact()
    note: dict[str, Any] = {} if last is None else {"artifact": str(last)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folders = [str(each) for each in (written, *before)][:_REMEMBERED]
        # escaped, so that a name that is not UTF-8 is kept too
        while len(text := json.dumps({**note, "folders": folders}).encode("ascii")) > _REMEMBERED_BYTES:
            folders.pop()
        write_whole(path, text)
    except OSError as error:
        return f"{path} cannot be written ({reason_of(error)})"
    return None


def _note() -> dict[str, Any]:
    try:
        kept = json.loads(read_bytes(_last_artifact_file(), "", _REMEMBERED_BYTES))
    except (GemmaAwqError, OSError, ValueError, RecursionError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _usable(name: object) -> Path | None:
    """The path of that name, or None if it cannot be one."""
    if not isinstance(name, str) or not os.path.isabs(name) or "\0" in name:
        return None
    try:
        Path(name).exists()  # raises for an impossible name
    except (OSError, ValueError):
        return None
    return Path(name)
