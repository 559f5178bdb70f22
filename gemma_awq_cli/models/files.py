"""A checkpoint folder's files by name, and its JSON files read. Imports nothing heavy."""

import json
from pathlib import Path
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
REDOWNLOAD = "Download or copy the checkpoint again; compare its sizes with the source's."


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint; a clear error if it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise GemmaAwqError(f"{path} does not exist.", "Give a folder that holds a Hugging Face checkpoint.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise GemmaAwqError(f"{path} is not valid JSON: {error}.", REDOWNLOAD) from None
    except OSError as error:
        raise GemmaAwqError(
            f"{path} cannot be read: {error.strerror}.", "Check the path and its permissions."
        ) from None
    if not isinstance(value, dict):
        raise GemmaAwqError(f"{path} does not hold a JSON object.", REDOWNLOAD)
    return value
