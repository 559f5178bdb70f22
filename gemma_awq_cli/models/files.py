"""A checkpoint folder's files by name, and its JSON files read. Imports nothing heavy."""

import os
from pathlib import Path
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.reading import JSON_BYTES, parse_json_object, read_text

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
REDOWNLOAD = "Download or copy the checkpoint again; compare its sizes with the source's."


def read_json(path: Path, hint: str = REDOWNLOAD) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint; a clear error if it is missing or damaged."""
    if not os.path.exists(path):  # a name that is too long is not there either
        raise GemmaAwqError(f"{path} does not exist.", "Give a folder that holds a Hugging Face checkpoint.")
    return parse_json_object(read_text(path, hint, JSON_BYTES), path, hint)
