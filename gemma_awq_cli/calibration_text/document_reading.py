"""How much of a text is read, and which part: all of a short one, a bounded part of a long one.

A long text is either read from its beginning (to measure on), or drawn by a seed (to calibrate on): blocks from all
over a .txt or .jsonl file, rows of what cannot be read but from its beginning, files of a folder.
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
from gemma_awq_cli.calibration_text.document_forms import Document, document_of
from gemma_awq_cli.errors import GemmaAwqError, some
from gemma_awq_cli.system.failures import system_errors
from gemma_awq_cli.system.reading import open_regular
from gemma_awq_cli.system.text_input import LINE_BYTES, decode, plain_lines, require_text, require_utf8_mark

WHOLE = 2 << 20  # bytes of a text that is read as a whole, however little is wanted of it
BLOCK = 1 << 15  # bytes that are drawn together
SCANNED = 4  # times WHOLE: characters from a file's beginning that rows are drawn from, where blocks cannot be
HOPELESS = 1000  # bad rows of a file before the first good one
_SHOWN = 3


@dataclass
class BadRows:
    """The rows that could not be used. strict: the first of them is an error."""

    strict: bool = False
    count: int = 0
    first: list[GemmaAwqError] = field(default_factory=list)

    def add(self, error: GemmaAwqError) -> None:
        if self.strict:
            raise error
        self.count += 1
        if len(self.first) < _SHOWN:
            self.first.append(error)

    def join(self, other: "BadRows") -> None:
        self.count += other.count
        self.first = [*self.first, *other.first][:_SHOWN]

    def described(self, used: int) -> str:
        """How many there are beside `used` good ones, and what is wrong with the first."""
        reasons = " ".join(error.message for error in self.first)
        return f"{self.count} of {used + self.count} rows were skipped: {reasons}"

    def refuse_all(self, where: object) -> None:
        """The error that a text without any good row is; none if there is no bad one."""
        if self.count == 1:
            raise self.first[0]
        if self.count:
            raise GemmaAwqError(
                f"{where} has no row that can be used: {' '.join(error.message for error in self.first)}",
                self.first[0].hint,
            )


@dataclass
class Wanted:
    """What is to be read of a text, and what came of it.

    characters: about so many; rng: draws them from all over the text, None takes its beginning; column: the one that
    holds the text; whole: the size up to which a text is not cut. complete: whether nothing was left out; notes: what a
    person should hear.
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
        """The size up to which a text is read as a whole."""
        return max(self.whole, self.characters)


def read_documents(path: Path, wanted: Wanted) -> list[Document]:
    """The documents of a file or of a folder of files."""
    if not path.is_dir():
        return _read_file(path, wanted)
    files, left = files_of(path)
    if left:
        wanted.notes.append(f"Not read in {path}: {some(left, 8)}.")
    if not files:
        raise GemmaAwqError(f"{path} holds no file that is read.", f"Files: {KINDS_NAMED}.")
    sizes = {file: _size(file) for file in files}
    total = sum(sizes.values())
    drawn = total > wanted.limit and wanted.rng is not None
    if drawn and wanted.rng is not None:
        wanted.rng.shuffle(files)
    documents: list[Document] = []
    characters = 0
    for file in files:
        if characters >= (wanted.characters if drawn else wanted.limit):
            wanted.complete = False
            break
        part = replace(wanted, complete=True)
        if drawn:
            part.characters, part.whole = max(BLOCK, wanted.characters * sizes[file] // total), BLOCK
        try:
            found = _read_file(file, part)
        except GemmaAwqError as error:
            wanted.bad.add(error)
            continue
        wanted.complete = wanted.complete and part.complete
        documents += found
        characters += sum(document.characters for document in found)
    return documents


def _size(path: Path) -> int:
    with system_errors(path, HINT):
        return path.stat().st_size


def _read_file(path: Path, wanted: Wanted) -> list[Document]:
    kind = kind_of(path)
    if kind is None:
        raise GemmaAwqError(f"{path} is not a text this tool reads.", f"Files: {KINDS_NAMED}.")
    if kind.suffix in TEXT:
        return _read_text(path, kind, wanted)
    known = not kind.packed and kind.suffix not in PARQUET  # otherwise the size says little
    size = _size(path)
    if known and size <= wanted.limit:
        return list(documents_of(path, rows_of(path, kind), wanted))
    if wanted.rng is None:
        return _first(documents_of(path, rows_of(path, kind, wanted.column), wanted), wanted.limit, wanted)
    if known and kind.suffix in LINES:
        return _draw_lines(path, size, wanted)
    order = wanted.rng if kind.suffix in PARQUET and size > wanted.limit else None
    scanned = max(SCANNED * wanted.whole, 4 * wanted.characters)
    return _drawn(
        _first(documents_of(path, rows_of(path, kind, wanted.column, order), wanted), scanned, wanted), wanted
    )


def documents_of(whole: object, rows: Iterable[Row], wanted: Wanted) -> Iterator[Document]:
    """The rows' documents; a row that is none is noted as bad."""
    good, bad = False, BadRows()
    for where, row in rows:
        try:
            if isinstance(row, GemmaAwqError):
                raise row
            document = document_of(row, wanted.column, where)
        except GemmaAwqError as error:
            wanted.bad.add(error)
            bad.add(error)
            if not good and bad.count >= HOPELESS:
                bad.refuse_all(whole)
        else:
            good = True
            yield document


def _first(documents: Iterable[Document], characters: int, wanted: Wanted) -> list[Document]:
    """The documents up to about so many characters."""
    found, size = [], 0
    for document in documents:
        if size >= characters:
            wanted.complete = False
            break
        found.append(document)
        size += document.characters + 1  # however many empty ones there are, they end
    return found


def _drawn(documents: list[Document], wanted: Wanted) -> list[Document]:
    """All documents if they are no more than is read as a whole, else some of them, by the seed."""
    if wanted.rng is None or sum(document.characters for document in documents) <= wanted.limit:
        return documents
    wanted.rng.shuffle(documents)
    return _first(documents, wanted.characters, wanted)


def _read_text(path: Path, kind: Kind, wanted: Wanted) -> list[Document]:
    """A plain text: one document, or blocks of it."""
    size = None if kind.packed else _size(path)
    with unpacked(path, kind) as stream:
        begun = stream.read(4)
        require_utf8_mark(begun, path)
        if wanted.rng is not None and size is not None and size > wanted.limit:
            return _draw_text(path, stream, size, wanted)
        limit = wanted.limit if wanted.rng is None else max(SCANNED * wanted.whole, wanted.limit)
        data = begun + _up_to(stream, limit)
    if wanted.rng is not None and len(data) > wanted.limit:
        return _draw_text(path, io.BytesIO(data), len(data), wanted)
    if len(data) > limit:
        wanted.complete = False
        data = _to_the_last_line(data)
    return [Document(plain_text(data, path), path)]


def _up_to(stream: BinaryIO, limit: int) -> bytes:
    """At most `limit` bytes, in memory for those that are there: `read` takes room for all that it is asked for."""
    parts = []
    while limit > 0 and (part := stream.read(min(limit, 1 << 20))):
        parts.append(part)
        limit -= len(part)
    return b"".join(parts)


def plain_text(data: bytes, where: object) -> str:
    """The bytes of a text that is one document: UTF-8, with \\n at the end of every line."""
    return plain_lines(require_text(decode(data, where), where))


def _draw_text(path: Path, stream: BinaryIO, size: int, wanted: Wanted) -> list[Document]:
    """Blocks of a text, each from the beginning of a line to the end of one."""
    found = []
    for start in _blocks(size, wanted):
        stream.seek(start)
        where = f"{path} after byte {start}"
        found.append(Document(plain_text(_trimmed(stream.read(BLOCK)), where), where))
    return found


def _blocks(size: int, wanted: Wanted) -> list[int]:
    """Where the blocks begin that are drawn of a file."""
    assert wanted.rng is not None
    wanted.complete = False
    every = -(-size // BLOCK)
    count = min(every, -(-wanted.characters // BLOCK))
    return [BLOCK * number for number in sorted(wanted.rng.sample(range(every), count))]


def _trimmed(block: bytes) -> bytes:
    """A block from the beginning of a line, or else of a word or of a character, to the end of one."""
    for end in (b"\n", b"\r", b" "):
        first, last = block.find(end), block.rfind(end)
        if last - first > len(block) // 2:
            return block[first + 1 : last]
    return _to_the_last_character(block.lstrip(bytes(range(0x80, 0xC0))))


def _to_the_last_line(data: bytes) -> bytes:
    last = max(data.rfind(b"\n"), data.rfind(b"\r"))
    return data[:last] if last > len(data) // 2 else _to_the_last_character(data)


def _to_the_last_character(data: bytes) -> bytes:
    """The bytes without the last character, of which some may be missing."""
    last = len(data) - 1
    while last > 0 and data[last] & 0xC0 == 0x80:
        last -= 1
    return data[:last]


def _draw_lines(path: Path, size: int, wanted: Wanted) -> list[Document]:
    """The rows of JSON lines that begin in blocks of the file."""
    with open_regular(path, HINT) as file, system_errors(path, HINT):
        require_utf8_mark(file.read(4), path)
        lines = _Lines(path)

        def rows() -> Iterator[Row]:
            for start in _blocks(size, wanted):
                file.seek(max(start - 1, 0))
                if start:
                    _ = file.readline(BLOCK + 1)  # the rest of the line that begins before the block
                while (at := file.tell()) < min(start + BLOCK, size):
                    line = file.readline(LINE_BYTES)
                    where = _Line(lines, at)
                    if len(line) == LINE_BYTES and not line.endswith(b"\n"):
                        raise GemmaAwqError(f"{where} has more than {LINE_BYTES} bytes.", "Write shorter rows.")
                    if line.strip():
                        yield where, line_of_json(line, where)

        return list(documents_of(path, rows(), wanted))


class _Lines:
    """The numbers of lines by where they begin: counted only when somebody asks, and best asked in order."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._at, self._number = 0, 1

    def number(self, at: int) -> int:
        if at < self._at:
            self._at, self._number = 0, 1
        with open_regular(self.path, HINT) as file, system_errors(self.path, HINT):
            file.seek(self._at)
            while self._at < at and (block := file.read(min(1 << 20, at - self._at))):
                self._number += block.count(b"\n")
                self._at += len(block)
        return self._number


@dataclass(frozen=True)
class _Line:
    """A place in a file of lines, for people."""

    lines: _Lines
    at: int

    def __str__(self) -> str:
        return f"{self.lines.path}, line {self.lines.number(self.at)}"
