"""The journal of an interrupted quantization: the layers that are done, and the conditions that they depend on.

A line is appended and forced to the disk only after everything that it records is on the disk. A process that is killed
at any moment therefore leaves a true journal. A last line without a line break was cut off by the kill and is ignored.
"""

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.system.json_input import parse_json
from gemma_awq_cli.system.reading import read_bytes

JOURNAL = "journal.jsonl"
ANEW = "Start over with --force."
JOURNAL_BYTES = 64 * 1024 * 1024  # a layer takes a few kilobytes
Fingerprint = dict[str, Any]  # everything that the artifact's bytes depend on, by names that a user understands
# Arguments in it that change no byte by themselves: what is planned for a memory limit has entries of its own.
WITHOUT_EFFECT = ("max_memory",)


@dataclass(frozen=True)
class KeptGroups:
    """How many of a checkpoint's groups of weights kept the 4-bit grid that they were on.

    on_grid: those that are stored on their own grid; exact: those whose weights all come back bit for bit when they are
    dequantized to the checkpoint's dtype.
    """

    groups: int
    on_grid: int
    exact: int


@dataclass(frozen=True)
class GroupRecord:
    """The decisions for one group of linears, as the journal and the report hold them.

    Errors are mean squared output errors over the calibration tokens, summed over the outputs: `error` of the stored
    weights, `rtn_error` of round-to-nearest. If weights were corrected for the layers before, the errors are those of
    rounding the corrected weights. kept: of a checkpoint whose grid is kept. There are no calibration tokens then, and
    the errors are the squared errors of the weights, summed.
    """

    name: str
    linears: tuple[str, ...]
    method: str
    exponents: tuple[float, ...]
    error: float
    rtn_error: float
    gram_block: int
    kept: KeptGroups | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields by their names, without `kept` if it is None."""
        return {name: value for name, value in asdict(self).items() if name != "kept" or value is not None}


@dataclass(frozen=True)
class ExpertsRecord(GroupRecord):
    """The record of a group of linears of all experts.

    Errors are sums over the experts. starved: the experts that fewer calibration tokens reached than they have input
    channels. The errors of these count tokens that were not routed to them, in place of those that they lack.
    """

    starved: tuple[int, ...] = ()


@dataclass(frozen=True)
class LayerRecord:
    """One finished layer. seconds: the time that it took."""

    groups: tuple[GroupRecord, ...]
    seconds: float

    @property
    def error(self) -> float:
        return sum(group.error for group in self.groups)

    @property
    def rtn_error(self) -> float:
        return sum(group.rtn_error for group in self.groups)


class Journal:
    """The first line holds the fingerprint, every further line the record of one finished layer.

    Reading writes nothing, so a process may look while another one works. Whoever adds a line holds the lock of the
    folder.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / JOURNAL
        self.fingerprint: Fingerprint | None = None
        self.records: list[LayerRecord] = []
        self._complete = 0  # bytes of complete lines
        if not os.path.lexists(self.path):
            return
        content = read_bytes(self.path, ANEW, JOURNAL_BYTES)
        self._complete = content.rfind(b"\n") + 1
        for number, line in enumerate(content[: self._complete].splitlines(), 1):
            value = self._read(number, line)
            if number == 1:
                self.fingerprint = value
            else:
                self.records.append(self._record(number, value))

    def begin(self, fingerprint: Fingerprint) -> None:
        """Start over with an empty journal."""
        self.path.unlink(missing_ok=True)
        self.fingerprint, self.records, self._complete = fingerprint, [], 0
        self._append(fingerprint)

    def add(self, record: LayerRecord) -> None:
        """Record one more finished layer, all of whose files are on the disk."""
        self._append(record_to_json(record))
        self.records.append(record)

    def require_at_most(self, layers: int) -> None:
        """Raise if the journal has more layers than the model."""
        if len(self.records) > layers:
            raise GemmaAwqError(f"{self.path} records {len(self.records)} layers, but the model has {layers}.", ANEW)

    def _append(self, line: dict[str, Any]) -> None:
        # this overwrites a line that a kill cut off
        with open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            file.truncate(self._complete)
            file.seek(self._complete)
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            self._complete = file.tell()

    def _read(self, number: int, line: bytes) -> dict[str, Any]:
        where = f"{self.path}, line {number}"
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError:
            raise GemmaAwqError(f"{where} is damaged: it is not UTF-8.", ANEW) from None
        value = parse_json(text, where, ANEW)
        if not isinstance(value, dict):
            raise self._damaged(number)
        return value

    def _record(self, number: int, value: dict[str, Any]) -> LayerRecord:
        record = record_from_json(value)
        if record is None:
            raise self._damaged(number)
        return record

    def _damaged(self, number: int) -> GemmaAwqError:
        return GemmaAwqError(f"{self.path}, line {number} is damaged: it is not the record of a layer.", ANEW)


def record_to_json(record: LayerRecord) -> dict[str, Any]:
    """Return a finished layer as plain data."""
    return {"groups": [group.to_json() for group in record.groups], "seconds": record.seconds}


def record_from_json(value: Any) -> LayerRecord | None:
    """Return the finished layer that plain data describes; None for anything else."""
    if not isinstance(value, dict):
        return None
    groups = value.get("groups")
    if not (isinstance(groups, list) and _is_number(value.get("seconds")) and all(map(_is_group, groups))):
        return None
    return LayerRecord(tuple(_group(group) for group in groups), value["seconds"])


def has_finished_layers(folder: Path) -> bool:
    """Whether the journal in `folder` records any layer. A journal that cannot be read counts: the user decides."""
    try:
        return bool(Journal(folder).records)
    except GemmaAwqError:
        return True


def _is_group(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and all(isinstance(value.get(name), str) for name in ("name", "method"))
        and all(isinstance(value.get(name), list) for name in ("linears", "exponents"))
        and all(isinstance(linear, str) for linear in value["linears"])
        and all(map(_is_number, value["exponents"]))
        and all(_is_number(value.get(name)) for name in ("error", "rtn_error"))
        and isinstance(value.get("gram_block"), int)
        and not isinstance(value["gram_block"], bool)
        and ("kept" not in value or _is_kept(value["kept"]))
        and isinstance(value.get("starved", []), list)
        and all(type(expert) is int for expert in value.get("starved", []))
    )


def _is_kept(value: Any) -> bool:
    return isinstance(value, dict) and all(type(value.get(field.name)) is int for field in fields(KeptGroups))


def _group(value: dict[str, Any]) -> GroupRecord:
    kind = ExpertsRecord if "starved" in value else GroupRecord
    held: dict[str, Any] = {field.name: value[field.name] for field in fields(kind) if field.name in value}
    if "kept" in held:
        held["kept"] = KeptGroups(**{field.name: held["kept"][field.name] for field in fields(KeptGroups)})
    held |= {name: tuple(one) for name, one in held.items() if isinstance(one, list)}
    return kind(**held)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def differences(then: Fingerprint, now: Fingerprint) -> list[str]:
    """Return what changed between two runs, such as `seed: 0 then, 1 now`."""
    names = list(dict.fromkeys([*then, *now]))
    return [f"{name}: {_short(then.get(name))} then, {_short(now.get(name))} now" for name in names
            if name not in WITHOUT_EFFECT and then.get(name) != now.get(name)]  # fmt: skip


def require_same(then: Fingerprint, now: Fingerprint, where: Path) -> None:
    """Raise, with the names of what differs, unless both runs would end in the same bytes."""
    if changed := differences(then, now):
        raise GemmaAwqError(
            f"{where} was made under other conditions: {'; '.join(changed)}.",
            "To resume it, use the same options and machine. Otherwise start over with --force.",
        )


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
