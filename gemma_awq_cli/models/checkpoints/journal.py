"""The journal that lets an interrupted quantization resume: the layers that are done, and what they depend on.

A line is appended and forced to the disk only after everything that it describes is there, so a process killed at any
moment leaves a true journal. A line that the kill cut off does not count.
"""

import json
import os
from pathlib import Path
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.system.json_input import parse_json
from gemma_awq_cli.system.reading import read_bytes

JOURNAL = "journal.jsonl"
ANEW = "Start over with --force."
JOURNAL_BYTES = 64 * 1024 * 1024  # each layer takes a few kilobytes
Fingerprint = dict[str, Any]  # everything that the artifact's bytes depend on, by a name that a user understands

# The keys of a layer's record and of each of its groups; the artifact's report is made of them.
_RECORD = {"groups": list, "seconds": (int, float)}
_GROUP = {
    "name": str, "linears": list, "method": str, "exponents": list, "error": (int, float), "rtn_error": (int, float),
    "gram_block": int,
}  # fmt: skip


class Journal:
    """The first line holds the fingerprint, every further line a record of one finished layer.

    Reading it writes nothing, so a process may look while another one works. Whoever adds to it must hold the lock of
    its folder.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / JOURNAL
        self.fingerprint: Fingerprint | None = None
        self.records: list[dict[str, Any]] = []
        self._whole = 0  # bytes of complete lines
        if not os.path.lexists(self.path):
            return
        content = read_bytes(self.path, ANEW, JOURNAL_BYTES)
        self._whole = content.rfind(b"\n") + 1
        lines = [self._read(number, line) for number, line in enumerate(content[: self._whole].splitlines(), 1)]
        if lines:
            self.fingerprint, self.records = lines[0], lines[1:]

    def begin(self, fingerprint: Fingerprint) -> None:
        """Start over with a new fingerprint."""
        self.path.unlink(missing_ok=True)
        self.fingerprint, self.records, self._whole = fingerprint, [], 0
        self._append(fingerprint)

    def add(self, record: dict[str, Any]) -> None:
        """Record that one more layer is done and that all of its files are on the disk."""
        self._append(record)
        self.records.append(record)

    def require_at_most(self, layers: int) -> None:
        """An error if it records more layers than the model has."""
        if len(self.records) > layers:
            raise GemmaAwqError(f"{self.path} records {len(self.records)} layers; the model has {layers}.", ANEW)

    def _append(self, line: dict[str, Any]) -> None:
        # a line that a kill cut off is overwritten
        with open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            file.truncate(self._whole)
            file.seek(self._whole)
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            self._whole = file.tell()

    def _read(self, number: int, line: bytes) -> dict[str, Any]:
        where = f"{self.path}, line {number}"
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError:
            raise GemmaAwqError(f"{where} is damaged: it is not UTF-8.", ANEW) from None
        value = parse_json(text, where, ANEW)
        is_sound = isinstance(value, dict) if number == 1 else _is_record(value)
        if not is_sound:
            raise GemmaAwqError(f"{where} is damaged: it is not the record of a layer.", ANEW)
        return dict(value)


def _is_record(value: Any) -> bool:
    return _holds(value, _RECORD) and all(
        _holds(group, _GROUP)
        and all(isinstance(linear, str) for linear in group["linears"])
        and all(_is(number, (int, float)) for number in group["exponents"])
        for group in value["groups"]
    )


def _holds(value: Any, kinds: dict[str, Any]) -> bool:
    return isinstance(value, dict) and all(name in value and _is(value[name], kind) for name, kind in kinds.items())


def _is(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def differences(then: Fingerprint, now: Fingerprint) -> list[str]:
    """The differences between two runs, such as `seed: 0 then, 1 now`."""
    names = list(dict.fromkeys([*then, *now]))
    return [f"{name}: {_short(then.get(name))} then, {_short(now.get(name))} now" for name in names
            if then.get(name) != now.get(name)]  # fmt: skip


def require_same(then: Fingerprint, now: Fingerprint, where: Path) -> None:
    """An error that names what differs, unless both runs would end in the same bytes."""
    if changed := differences(then, now):
        raise GemmaAwqError(
            f"{where} was started under other conditions: {'; '.join(changed)}.",
            "Give the same options again to resume it, or start over with --force.",
        )


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
