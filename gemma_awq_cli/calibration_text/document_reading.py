"""How much of a text is read, and which part: all of a short text, a bounded part of a long one.

A long text is read from its beginning (to measure on), or a seed draws parts of it (to calibrate on): blocks from all
over a .txt or .jsonl file, rows of a file that can be read only from its beginning, files of a folder.
"""

import io
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from gemma_awq_cli.calibration_text.document_files import (
    HINT,
    KINDS_NAMED,
    LINES,
    PARQUET,
    TEXT,
    Kind,
    Row,
    kind_of,
    line_of_json,
    rows_of,
    unpacked,
)
from gemma_awq_cli.calibration_text.document_folder import files_of
from gemma_awq_cli.calibration_text.document_forms import Document, document_from_row
from gemma_awq_cli.errors import GemmaAwqError, some
from gemma_awq_cli.system.failures import system_errors
from gemma_awq_cli.system.reading import open_regular
from gemma_awq_cli.system.text_input import LINE_BYTES, decode, plain_lines, require_text, require_utf8_mark

WHOLE = 2 << 20  # bytes: a text up to this size is read as a whole, however little of it is needed
BLOCK = 1 << 15  # bytes of a block that is drawn
SCANNED = 4  # times WHOLE: characters from a file's beginning that rows are drawn from, where blocks cannot be drawn
HOPELESS = 1000  # bad rows before the first good one, after which a file is given up
_SHOWN = 3


@dataclass
class BadRows:
    """The rows that could not be used. strict: the first of them raises; first: the errors of the first few."""

    strict: bool = False
    count: int = 0
    first: list[GemmaAwqError] = field(default_factory=list)

    def add(self, error: GemmaAwqError) -> None:
        """Count a bad row, or raise its error if `strict`."""
        if self.strict:
            raise error
        self.count += 1
        if len(self.first) < _SHOWN:
            self.first.append(error)

    def join(self, other: "BadRows") -> None:
        """Add another text's bad rows."""
        self.count += other.count
        self.first = [*self.first, *other.first][:_SHOWN]

    def summary(self, used: int) -> str:
        """Return a sentence on how many rows were skipped, beside `used` good ones, and why the first were."""
        reasons = " ".join(error.message for error in self.first)
        return f"{self.count} of {used + self.count} rows were skipped: {reasons}"

    def raise_if_any(self, where: object) -> None:
        """Raise the error of a text without any good row; does nothing if there is no bad one either."""
        if self.count == 1:
            raise self.first[0]
        if self.count:
            raise GemmaAwqError(
                f"{where} has no usable row: {' '.join(error.message for error in self.first)}",
                self.first[0].hint,
            )


@dataclass
class Reading:
    """One reading of a text: how much of it is needed, and what came of that.

    characters: about how many are needed; rng: draws them from all over the text, None takes its beginning; column: the
    one that holds the text, None to look for the known ones; whole: size in bytes up to which a text is not cut.
    Results: bad: the rows that could not be used; complete: whether nothing was left out; notes: remarks for the user.
    """

    characters: int
    rng: random.Random | None = None
    column: str | None = None
    whole: int = WHOLE
    bad: BadRows = field(default_factory=BadRows)
    complete: bool = True
    notes: list[str] = field(default_factory=list)

    @property
    def limit(self) -> int:
        """Size in bytes up to which a text is read as a whole."""
        return max(self.whole, self.characters)


def read_documents(path: Path, reading: Reading) -> list[Document]:
    """Return the documents of a file or of a folder of files, as much of them as `reading` asks for."""
    return _read_folder(path, reading) if path.is_dir() else _read_file(path, reading)


def _read_folder(path: Path, reading: Reading) -> list[Document]:
    files, left = files_of(path)
    if left:
        reading.notes.append(f"Not read in {path}: {some(left, 8)}.")
    if not files:
        raise GemmaAwqError(f"{path} holds no text file.", f"Supported files: {KINDS_NAMED}.")
    sizes = {file: _size(file) for file in files}
    total = sum(sizes.values())
    drawn = total > reading.limit and reading.rng is not None
    if drawn and reading.rng is not None:
        reading.rng.shuffle(files)
    documents: list[Document] = []
    characters = 0
    for file in files:
        if characters >= (reading.characters if drawn else reading.limit):
            reading.complete = False
            break
        part = replace(reading, complete=True)
        if drawn:
            part.characters, part.whole = max(BLOCK, reading.characters * sizes[file] // total), BLOCK
        try:
            found = _read_file(file, part)
        except GemmaAwqError as error:
            reading.bad.add(error)
            continue
        reading.complete = reading.complete and part.complete
        documents += found
        characters += sum(document.characters for document in found)
    return documents


def _size(path: Path) -> int:
    with system_errors(path, HINT):
        return path.stat().st_size


def _read_file(path: Path, reading: Reading) -> list[Document]:
    kind = kind_of(path)
    if kind is None:
        raise GemmaAwqError(f"{path} is not a supported text file.", f"Supported files: {KINDS_NAMED}.")
    if kind.suffix in TEXT:
        return _read_text(path, kind, reading)
    known = not kind.packed and kind.suffix not in PARQUET  # else the size says little
    size = _size(path)
    if known and size <= reading.limit:
        return list(documents_from_rows(path, rows_of(path, kind), reading))
    if reading.rng is None:
        return _take(documents_from_rows(path, rows_of(path, kind, reading.column), reading), reading.limit, reading)
    if known and kind.suffix in LINES:
        return _draw_lines(path, size, reading)
    order = reading.rng if kind.suffix in PARQUET and size > reading.limit else None
    scanned = max(SCANNED * reading.whole, 4 * reading.characters)
    return _draw_documents(
        _take(documents_from_rows(path, rows_of(path, kind, reading.column, order), reading), scanned, reading), reading
    )


def documents_from_rows(whole: object, rows: Iterable[Row], reading: Reading) -> Iterator[Document]:
    """Yield the rows' documents; a row without one is counted as bad. whole: the text's name in an error."""
    good, bad = False, BadRows()
    for where, row in rows:
        try:
            if isinstance(row, GemmaAwqError):
                raise row
            document = document_from_row(row, reading.column, where)
        except GemmaAwqError as error:
            reading.bad.add(error)
            bad.add(error)
            if not good and bad.count >= HOPELESS:
                bad.raise_if_any(whole)
        else:
            good = True
            yield document


def _take(documents: Iterable[Document], characters: int, reading: Reading) -> list[Document]:
    """Return the first documents, up to about `characters`."""
    found, size = [], 0
    for document in documents:
        if size >= characters:
            reading.complete = False
            break
        found.append(document)
        size += document.characters + 1  # empty documents count too, so that they end
    return found


def _draw_documents(documents: list[Document], reading: Reading) -> list[Document]:
    """Return all documents if they are short enough to be read as a whole, else some of them, drawn by the seed."""
    if reading.rng is None or sum(document.characters for document in documents) <= reading.limit:
        return documents
    reading.rng.shuffle(documents)
    return _take(documents, reading.characters, reading)


def _read_text(path: Path, kind: Kind, reading: Reading) -> list[Document]:
    """Return a plain text as one document, or as the blocks that were drawn of it."""
    size = None if kind.packed else _size(path)
    with unpacked(path, kind) as stream:
        begun = stream.read(4)
        require_utf8_mark(begun, path)
        if reading.rng is not None and size is not None and size > reading.limit:
            return _draw_text(path, stream, size, reading)
        limit = reading.limit if reading.rng is None else max(SCANNED * reading.whole, reading.limit)
        data = begun + _read_at_most(stream, limit)
    if reading.rng is not None and len(data) > reading.limit:
        return _draw_text(path, io.BytesIO(data), len(data), reading)
    if len(data) > limit:
        reading.complete = False
        data = _to_the_last_line(data)
    return [Document(plain_text(data, path), path)]


def _read_at_most(stream: BinaryIO, limit: int) -> bytes:
    """Read at most `limit` bytes, a part at a time: `read` would allocate memory for all that it is asked for."""
    parts = []
    while limit > 0 and (part := stream.read(min(limit, 1 << 20))):
        parts.append(part)
        limit -= len(part)
    return b"".join(parts)


def plain_text(data: bytes, where: object) -> str:
    """Return the text of a document's bytes: decoded as UTF-8, with \\n at the end of every line."""
    return plain_lines(require_text(decode(data, where), where))


def _draw_text(path: Path, stream: BinaryIO, size: int, reading: Reading) -> list[Document]:
    """Return blocks of a text, each from the beginning of a line to the end of one."""
    found = []
    for start in _draw_blocks(size, reading):
        stream.seek(start)
        where = f"{path} after byte {start}"
        found.append(Document(plain_text(_trim_block(stream.read(BLOCK)), where), where))
    return found


def _draw_blocks(size: int, reading: Reading) -> list[int]:
    """Return the byte offsets of the blocks that are drawn from a file of `size` bytes, sorted."""
    assert reading.rng is not None
    reading.complete = False
    every = -(-size // BLOCK)
    count = min(every, -(-reading.characters // BLOCK))
    return [BLOCK * number for number in sorted(reading.rng.sample(range(every), count))]


def _trim_block(block: bytes) -> bytes:
    """Cut a block to whole lines, or else to whole words or whole characters."""
    for end in (b"\n", b"\r", b" "):
        first, last = block.find(end), block.rfind(end)
        if last - first > len(block) // 2:
            return block[first + 1 : last]
    return _to_the_last_character(block.lstrip(bytes(range(0x80, 0xC0))))


def _to_the_last_line(data: bytes) -> bytes:
    last = max(data.rfind(b"\n"), data.rfind(b"\r"))
    return data[:last] if last > len(data) // 2 else _to_the_last_character(data)


def _to_the_last_character(data: bytes) -> bytes:
    """Cut the last character, some of whose bytes may be missing."""
    last = len(data) - 1
    while last > 0 and data[last] & 0xC0 == 0x80:
        last -= 1
    return data[:last]


def _draw_lines(path: Path, size: int, reading: Reading) -> list[Document]:
    """Return the documents of the JSON lines that begin in drawn blocks of the file."""
    with open_regular(path, HINT) as file, system_errors(path, HINT):
        require_utf8_mark(file.read(4), path)
        lines = _LineNumbers(path)

        def rows() -> Iterator[Row]:
            for start in _draw_blocks(size, reading):
                file.seek(max(start - 1, 0))
                if start:
                    _ = file.readline(BLOCK + 1)  # the rest of the line that begins before the block
                while (at := file.tell()) < min(start + BLOCK, size):
                    line = file.readline(LINE_BYTES)
                    where = _LinePlace(lines, at)
                    if len(line) == LINE_BYTES and not line.endswith(b"\n"):
                        raise GemmaAwqError(f"{where} has more than {LINE_BYTES} bytes.", "Write shorter rows.")
                    if line.strip():
                        yield where, line_of_json(line, where)

        return list(documents_from_rows(path, rows(), reading))


class _LineNumbers:
    """Line numbers by byte offset: counted only when an error needs one, fastest in ascending order."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._at, self._number = 0, 1

    def number(self, at: int) -> int:
        """Return the number, from 1, of the line that begins at byte `at`."""
        if at < self._at:
            self._at, self._number = 0, 1
        with open_regular(self.path, HINT) as file, system_errors(self.path, HINT):
            file.seek(self._at)
            while self._at < at and (block := file.read(min(1 << 20, at - self._at))):
                self._number += block.count(b"\n")
                self._at += len(block)
        return self._number


@dataclass(frozen=True)
class _LinePlace:
    """A line's place, for an error message."""

    lines: _LineNumbers
    at: int

    def __str__(self) -> str:
        return f"{self.lines.path}, line {self.lines.number(self.at)}"
