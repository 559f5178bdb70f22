"""What lets an interrupted quantization go on: a journal of the layers that are done, and what they depend on.

A line is appended and forced to the disk only after everything it speaks of is there, so that a process killed at any
moment leaves a journal that is true. A line cut off by the kill is no line.
"""

import json
import os
from pathlib import Path
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.system.json_input import parse_json
from gemma_awq_cli.system.reading import read_bytes

JOURNAL = "journal.jsonl"
ANEW = "Begin anew with --force."
JOURNAL_BYTES = 64 * 1024 * 1024  # a layer takes some kilobytes
Fingerprint = dict[str, Any]  # everything that the artifact's bytes depend on, by a name that a user understands

# What a record of a layer holds, and what each of its groups does; the artifact's report is made of them.
_RECORD = {"groups": list, "seconds": (int, float)}
_GROUP = {
    "name": str, "linears": list, "method": str, "exponents": list, "error": (int, float), "rtn_error": (int, float),
    "gram_block": int,
}  # fmt: skip


class Journal:
    """The first line holds the fingerprint, every further line a record of one finished layer.

    To read it writes nothing, so that a process may look while another one works. Whoever adds to it holds the lock of
    its folder.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / JOURNAL
        self.fingerprint: Fingerprint | None = None
        self.records: list[dict[str, Any]] = []
        self._whole = 0  # bytes that are lines
        if not os.path.lexists(self.path):
            return
        content = read_bytes(self.path, ANEW, JOURNAL_BYTES)
        self._whole = content.rfind(b"\n") + 1
        lines = [self._read(number, line) for number, line in enumerate(content[: self._whole].splitlines(), 1)]
        if lines:
            self.fingerprint, self.records = lines[0], lines[1:]

    def begin(self, fingerprint: Fingerprint) -> None:
        """Start anew."""
        self.path.unlink(missing_ok=True)
        self.fingerprint, self.records, self._whole = fingerprint, [], 0
        self._append(fingerprint)

    def add(self, record: dict[str, Any]) -> None:
        """One more layer is done, and all of its files are on the disk."""
        self._append(record)
        self.records.append(record)

    def require_at_most(self, layers: int) -> None:
        """An error if it speaks of more layers than there are."""
        if len(self.records) > layers:
            raise GemmaAwqError(f"{self.path} speaks of {len(self.records)} layers; the model has {layers}.", ANEW)

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
            raise GemmaAwqError(f"{where} is damaged: it is no record of a layer.", ANEW)
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
