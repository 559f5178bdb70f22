"""Keep secrets and local paths out of what is uploaded: paths in JSON are removed, everything else stops the push."""

import hashlib
import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.local_paths import local_paths, mentioned_path, to_json, without_local_paths
from gemma_awq_cli.models.checkpoints.side_files import VOCABULARIES
from gemma_awq_cli.publish.artifact_folder import NOT_SENT
from gemma_awq_cli.publish.secret_search import find_secret
from gemma_awq_cli.publish.upload_file import UploadFile
from gemma_awq_cli.reports.artifact_files import CARD
from gemma_awq_cli.system.failures import system_errors
from gemma_awq_cli.system.json_input import parse_json
from gemma_awq_cli.system.reading import read_bytes
from gemma_awq_cli.system.text_input import decode

HEADER_LIMIT = 100 * 10**6  # bytes: safetensors' own limit
# SHA-256 of the Terms as Google's site serves them. The page holds keys of its own scripts, which every visitor gets.
_PUBLIC_PAGES = frozenset(("152fbbb72940545ffbb8f6691a6a99a2dea5c357165248969fd72a9dae37fa9d",))
_EDIT = f"Take it out of the file, or remove the file; {NOT_SENT}."


def without_paths(path: Path) -> tuple[UploadFile, list[str]]:
    """Return a file of an artifact as it is published, and the JSON fields from which paths of this machine were cut.

    Only JSON is changed, and of that no vocabulary. A file without such paths is uploaded byte for byte.
    """
    if path.suffix != ".json" or path.name in VOCABULARIES:
        return UploadFile(path.name, path), []
    cleaned, changed = without_local_paths(_parsed(path.name, read_bytes(path, _EDIT)))
    return UploadFile(path.name, to_json(cleaned) if changed else path), changed


def require_nothing_private(files: Iterable[UploadFile]) -> None:
    """Raise if any of these files holds what looks like a secret, or names a path of some machine."""
    for file in files:
        if file.name.endswith(".safetensors"):
            _require_clean_header(file)
            continue
        data = file.content if isinstance(file.content, bytes) else read_bytes(file.content, _EDIT)
        if hashlib.sha256(data).hexdigest() in _PUBLIC_PAGES:
            continue
        is_json = file.name.endswith(".json")
        _require_no_secret(file.name, data, is_json, file.name in VOCABULARIES)
        if is_json:
            _require_no_paths(file.name, _parsed(file.name, data))
        elif file.name == CARD or file.name.endswith(".jinja"):
            _require_no_paths(file.name, decode(data, file.name))


def _parsed(name: str, data: bytes) -> Any:
    hint = "Copy the file from the original model again."
    return parse_json(decode(data, name, hint), name, hint)


def _require_clean_header(file: UploadFile) -> None:
    """Check a safetensors file's metadata and the names of its tensors."""
    header = _header(file)
    _require_no_secret(file.name, header, is_json=False, vocabulary=True)
    metadata = _parsed(file.name, header).get("__metadata__", {})
    _require_no_secret(file.name, json.dumps(metadata).encode(), is_json=True, vocabulary=False)
    _require_no_paths(file.name, metadata)


def _header(file: UploadFile) -> bytes:
    assert isinstance(file.content, Path), "weights are never made in memory"
    with system_errors(file.content, _EDIT), file.content.open("rb") as opened:
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length <= HEADER_LIMIT:
            raise GemmaAwqError(f"{file.name} has no safetensors header.", "Quantize the model again.")
        return opened.read(length)


def _require_no_secret(name: str, data: bytes, is_json: bool, vocabulary: bool) -> None:
    if (found := find_secret(data, is_json, vocabulary)) is not None:
        where = f" ({found.place})" if found.place else ""
        raise GemmaAwqError(
            f"{name} holds what looks like {found.what}{where}.",
            f"Take it out of the file, and revoke it if others have seen it; {NOT_SENT}.",
        )


def _require_no_paths(name: str, value: Any) -> None:
    """value: parsed JSON, or the text of a file that is not JSON."""
    places = [("", mentioned_path(value))] if isinstance(value, str) else local_paths(value)
    for field, place in places:
        if place is not None:
            raise GemmaAwqError(f"{name} names a local path{f' in {field}' if field else ''}: {place}.", _EDIT)
