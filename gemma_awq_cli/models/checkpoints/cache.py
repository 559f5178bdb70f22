"""The tool's cache folder, and the artifact that was written last, remembered between commands."""

import json
import os
from pathlib import Path

import platformdirs

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.system.failures import reason_of
from gemma_awq_cli.system.reading import read_bytes
from gemma_awq_cli.system.saving import local_path, write_whole

_REMEMBERED_BYTES = 100_000
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
    path = _last_artifact_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # escaped, so that a name that is not UTF-8 is kept too
        write_whole(path, json.dumps({"artifact": str(folder.resolve())}).encode("ascii"))
    except OSError as error:
        return f"{path} cannot be written ({reason_of(error)})"
    return None


def last_artifact() -> Path | None:
    """The last artifact written, which may have been moved since; None if none is remembered or the note is damaged."""
    try:
        kept = json.loads(read_bytes(_last_artifact_file(), "", _REMEMBERED_BYTES))
        name = kept.get("artifact") if isinstance(kept, dict) else None
        if not isinstance(name, str) or not os.path.isabs(name):
            return None
        Path(name).exists()  # raises for an impossible name
    except (GemmaAwqError, OSError, ValueError, RecursionError):
        return None
    return None if "\0" in name else Path(name)
