"""What the tool keeps for the user between two commands: its cache folder, and which artifact was written last."""

import json
import os
from pathlib import Path

import platformdirs

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.reading import home_path

ENVIRONMENT = "GEMMA_AWQ_CACHE"


def cache_folder() -> Path:
    """`GEMMA_AWQ_CACHE`, by default the user's cache folder + gemma-awq. Not created here."""
    configured = os.environ.get(ENVIRONMENT)
    if not configured:
        return Path(platformdirs.user_cache_dir("gemma-awq", False))
    folder = home_path(configured)
    if folder.parts[:1] and folder.parts[0].startswith("~"):
        raise GemmaAwqError(f"{ENVIRONMENT} is {configured}, and there is no such user.", f"Set {ENVIRONMENT} again.")
    return folder


def _last_artifact_file() -> Path:
    return cache_folder() / "last-artifact.json"


def remember_artifact(folder: Path) -> str | None:
    """Make `folder` what `run` takes when none is named. Returns why that failed, if it did: the artifact is whole."""
    path = _last_artifact_file()
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps({"artifact": str(folder.resolve())}), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        return f"{path} cannot be written ({error.strerror})"
    return None


def last_artifact() -> Path | None:
    """The last artifact written, if it is remembered (it may have been moved since)."""
    try:
        return Path(json.loads(_last_artifact_file().read_text(encoding="utf-8"))["artifact"])
    except (OSError, json.JSONDecodeError, KeyError, TypeError):
        return None
