"""What lets an interrupted quantization go on: a journal of the layers that are done, and what they depend on.

A line is appended and forced to the disk only after everything it speaks of is there, so that a process killed at any
moment leaves a journal that is true. A line cut off by the kill is no line.
"""

import json
import os
from pathlib import Path
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError

JOURNAL = "journal.jsonl"
Fingerprint = dict[str, Any]  # everything that the artifact's bytes depend on, by a name that a user understands


class Journal:
    """The first line holds the fingerprint, every further line a record of one finished layer."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / JOURNAL
        self.fingerprint: Fingerprint | None = None
        self.records: list[dict[str, Any]] = []
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))
        lines = [json.loads(line) for line in whole.splitlines()]
        if lines:
            self.fingerprint, self.records = lines[0], lines[1:]

    def begin(self, fingerprint: Fingerprint) -> None:
        """Start anew."""
        self.path.unlink(missing_ok=True)
        self.fingerprint, self.records = fingerprint, []
        self._append(fingerprint)

    def add(self, record: dict[str, Any]) -> None:
        """One more layer is done, and all of its files are on the disk."""
        self._append(record)
        self.records.append(record)

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("ab") as file:
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def differences(then: Fingerprint, now: Fingerprint) -> list[str]:
    """What changed between two runs: `seed: 0 then, 1 now`."""
    names = list(dict.fromkeys([*then, *now]))
    return [f"{name}: {_short(then.get(name))} then, {_short(now.get(name))} now" for name in names
            if then.get(name) != now.get(name)]  # fmt: skip


def require_same(then: Fingerprint, now: Fingerprint, where: Path) -> None:
    """An error that names what differs, unless both runs would end in the same bytes."""
    if changed := differences(then, now):
        raise GemmaAwqError(
            f"{where} was begun under other conditions: {'; '.join(changed)}.",
            "Give the same again to resume it, or begin anew with --force.",
        )


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
