"""What the tool keeps for the user between two commands: its cache folder, and which artifact was written last."""

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
    """`GEMMA_AWQ_CACHE`, by default the user's cache folder + gemma-awq. Not created here."""
    configured = os.environ.get(ENVIRONMENT)
    if not configured:
        return Path(platformdirs.user_cache_dir("gemma-awq", False))
    return local_path(Path(configured), f"set {ENVIRONMENT} to another folder")


def _last_artifact_file() -> Path:
    return cache_folder() / "last-artifact.json"


def remember_artifact(folder: Path) -> str | None:
    """Make `folder` what `run` takes when none is named. Returns why that failed, if it did: the artifact is whole."""
    path = _last_artifact_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # escaped: a name that is no UTF-8 is kept too
        write_whole(path, json.dumps({"artifact": str(folder.resolve())}).encode("ascii"))
    except OSError as error:
        return f"{path} cannot be written ({reason_of(error)})"
    return None


def last_artifact() -> Path | None:
    """The last artifact written, if it is remembered (it may have been moved since). What is damaged is forgotten."""
    try:
        kept = json.loads(read_bytes(_last_artifact_file(), "", _REMEMBERED_BYTES))
        name = kept.get("artifact") if isinstance(kept, dict) else None
        if not isinstance(name, str) or not os.path.isabs(name):
            return None
        Path(name).exists()  # raises for what can be no name
    except (GemmaAwqError, OSError, ValueError, RecursionError):
        return None
    return None if "\0" in name else Path(name)
