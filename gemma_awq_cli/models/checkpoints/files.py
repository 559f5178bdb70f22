"""A checkpoint folder's files by name, what they may be links to, and its JSON files read. Imports nothing heavy."""

import os
from pathlib import Path
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.system.json_input import JSON_BYTES, parse_json_object
from gemma_awq_cli.system.text_input import read_text

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Weights: nobody corrects them by hand, but some save them themselves.
REDOWNLOAD = "Download, copy or save the checkpoint again; compare the sizes of its files with the source's."
CORRECT = "Correct the file, or copy it from the original model again."


def read_json(path: Path, hint: str = CORRECT) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint; a clear error if it is missing or damaged."""
    if not os.path.exists(path):  # a name that is too long is not there either
        raise GemmaAwqError(f"{path} does not exist.", "Give a folder that holds a Hugging Face checkpoint.")
    return parse_json_object(read_text(path, hint, JSON_BYTES), path, hint)


def require_inside(folder: Path, path: Path) -> None:
    """An error if `path`, a file of a checkpoint folder, is a link to something outside.

    Whoever made the folder chose what its links lead to, but what they lead to is the reader's own: a private key, say,
    or another model. Allowed outside: a blob of a hub cache, which is named after its contents' hash, so that nobody
    can name one whose contents are a secret to them. The folder itself may be a link.
    """
    target = Path(os.path.realpath(path))
    if target.is_relative_to(os.path.realpath(folder)):
        return
    blobs = target.parent
    if blobs.name == "blobs" and blobs.parent.name.startswith("models--"):
        return
    raise GemmaAwqError(
        f"{path} leads out of its folder, to {target}.",
        f"If the file belongs to the model, put a copy of it there in place of the link: {path}",
    )
