"""The statement that is published beside an artifact, `provenance.json`: its hashes, and the files compared with them.

`publish/provenance.py` writes it. In a folder from the hub it is a stranger's.
"""

import hashlib
import re
from pathlib import Path
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.files import read_json, require_inside
from gemma_awq_cli.reports.artifact_files import PROVENANCE
from gemma_awq_cli.system.failures import system_errors

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
MOST_FILES = 10_000
ASK = "Ask whoever published it, or remove the file to go on without it."
NOT_FETCHED = ".gguf"  # what lies in the same repository for other programs
_NAME = re.compile(r"[^/\\:\x00-\x1f]+")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def stated_hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file that the folder's statement names; nothing if there is no statement."""
    path = folder / PROVENANCE
    if not path.is_file():
        return {}
    statement = read_json(path, ASK)
    subjects = statement.get("subject")
    if statement.get("_type") != STATEMENT_TYPE or not isinstance(subjects, list) or not subjects:
        raise GemmaAwqError(f"{path} is no in-toto statement about files.", ASK)
    if len(subjects) > MOST_FILES:
        raise GemmaAwqError(f"{path} names {len(subjects)} files.", ASK)
    return dict(_hash_of(subject, path) for subject in subjects)


def different_from_statement(folder: Path, stated: dict[str, str]) -> list[str]:
    """Return the names of the files that are missing or have other bytes than the statement says."""
    return [name for name, sha256 in stated.items() if not _is_as_stated(folder / name, sha256)]


def _hash_of(subject: Any, path: Path) -> tuple[str, str]:
    """Return the name and the hash of one subject. A name is one of a file in the folder, and no path."""
    name = subject.get("name") if isinstance(subject, dict) else None
    digest = subject.get("digest") if isinstance(subject, dict) else None
    sha256 = digest.get("sha256") if isinstance(digest, dict) else None
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name in (".", ".."):
        raise GemmaAwqError(f"{path} names {str(name)[:100]!r}, which is no file beside it.", ASK)
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise GemmaAwqError(f"{path} gives no SHA-256 of {name}.", ASK)
    return name, sha256


def _is_as_stated(path: Path, sha256: str) -> bool:
    if not path.is_file():
        return path.suffix == NOT_FETCHED
    require_inside(path.parent, path)
    with system_errors(path, "Check its permissions."), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256
