"""The unfinished work of one export: the parts that are on the disk, and the conditions that they depend on."""

import json
from pathlib import Path
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.files import read_json
from gemma_awq_cli.models.checkpoints.journal import ANEW
from gemma_awq_cli.system.saving import write_whole

_NAME = "parts.json"


class DoneParts:
    """A small file that names the parts that are done. It is replaced as a whole, after a part is on the disk."""

    def __init__(self, state: Path) -> None:
        self._path = state / _NAME
        self.fingerprint: dict[str, Any] = {}
        self.parts: list[str] = []
        if not self._path.is_file():
            return
        stored = read_json(self._path, ANEW)
        fingerprint, parts = stored.get("fingerprint"), stored.get("parts")
        if not (isinstance(fingerprint, dict) and isinstance(parts, list) and all(isinstance(p, str) for p in parts)):
            raise GemmaAwqError(f"{self._path} is damaged: it does not name the parts that are done.", ANEW)
        self.fingerprint, self.parts = fingerprint, parts

    def begin(self, fingerprint: dict[str, Any]) -> None:
        """Start over, with no part done."""
        self.fingerprint, self.parts = fingerprint, []
        self._save()

    def add(self, part: str) -> None:
        """Record one more part, which is on the disk."""
        self.parts.append(part)
        self._save()

    def _save(self) -> None:
        write_whole(self._path, json.dumps({"fingerprint": self.fingerprint, "parts": self.parts}).encode())


def has_done_parts(state: Path) -> bool:
    """Whether any part is recorded in `state`. A file that cannot be read counts: the user decides."""
    try:
        return bool(DoneParts(state).parts)
    except GemmaAwqError:
        return True
