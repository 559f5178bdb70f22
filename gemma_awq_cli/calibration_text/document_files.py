"""The rows of one file: JSON lines, a JSON array, CSV or parquet, gzipped or not, never in memory as a whole.

A row that cannot be read is yielded as its error, so that the others can still be used; an error of the whole file is
raised. What a row holds is the matter of `document_forms`.
"""

import csv
import gzip
import random
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from pathlib import Path, PurePath
from typing import Any, BinaryIO, cast

from gemma_awq_cli.calibration_text.document_forms import KEYS
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.system.extras import install_hint
from gemma_awq_cli.system.failures import VALIDATION_ERRORS, first_line, reason_of
from gemma_awq_cli.system.json_input import JSON_BYTES, json_items, parse_json
from gemma_awq_cli.system.reading import open_regular, require_regular
from gemma_awq_cli.system.text_input import LINE_BYTES, byte_lines, decode, require_utf8_mark

TEXT, LINES, JSON, TABLES, PARQUET = (".txt", ".md"), (".jsonl", ".ndjson"), (".json",), (".csv", ".tsv"), (".parquet",)
GZIP = ".gz"
FILE_KINDS = (*TEXT, *LINES, *JSON, *TABLES, *PARQUET)
KINDS_NAMED = f"{', '.join(FILE_KINDS)}; all but .parquet also as .gz"
HINT = "Check the path and its permissions."
_LINES_HINT = "Write one JSON object per line."
_JSON_HINT = "Write a JSON array of objects, or one object per line."
_TABLE_HINT = "The first line must name the columns, and a field with line breaks or quotes must be quoted."
_DELIMITERS = ",;\t|"
_UNDECODED = re.compile("[\udc80-\udcff]")  # how surrogateescape keeps a byte that is not UTF-8
_BATCH = 256  # parquet rows at a time
_PARQUET_BUFFER = 1 << 20  # bytes
# Unpacked bytes of a gzipped file: up to the first bound it is read freely; up to the second as long as it has unpacked
# to at most RATIO times its size. Text unpacks to some ten times its size, a decompression bomb to a thousand.
UNPACKED_FREELY, UNPACKED = 1 << 22, 1 << 30
PADDING = 1 << 16  # most zero bytes after the end of a gzip file, as tapes have them
RATIO = 200

Row = tuple[object, Any]  # its place, and a JSON value or the GemmaAwqError that says why there is none


@dataclass(frozen=True)
class Kind:
    """The kind of a file. suffix: one of FILE_KINDS; packed: whether it is gzipped."""

    suffix: str
    packed: bool


def kind_of(path: PurePath) -> Kind | None:
    """Return the kind of a file by its name, upper or lower case; None if it is not supported."""
    name = path.name.lower()
    packed = name.endswith(GZIP)
    suffix = PurePath(name.removesuffix(GZIP) if packed else name).suffix
    return Kind(suffix, packed) if suffix in FILE_KINDS and not (packed and suffix in PARQUET) else None


@contextmanager
def unpacked(path: Path, kind: Kind) -> Iterator[BinaryIO]:
    """Open a file's bytes, unpacked if it is gzipped. Errors of reading them inside become ones that name the file."""
    with open_regular(path, HINT) as file:
        try:
            yield cast(BinaryIO, _BoundedGzipFile(file, path)) if kind.packed else file
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise GemmaAwqError(
                f"{path} is not a valid gzip file: {first_line(error)}.", "Compress it again."
            ) from None
        except OSError as error:
            raise GemmaAwqError(f"{path} cannot be read: {reason_of(error)}.", HINT) from error


class _PackedBytes:
    """A gzip file's own bytes. gzip reads zeros after its end one by one, so their number is bounded."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._zeros = 0

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._zeros = self._zeros + 1 if size == 1 and data == b"\0" else 0
        if self._zeros > PADDING:
            raise gzip.BadGzipFile("too many zeros follow its end")
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class _BoundedGzipFile(gzip.GzipFile):
    """A gzip file that raises when it unpacks to more than any text would."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        super().__init__(fileobj=cast(BinaryIO, _PackedBytes(file)), mode="rb")
        self._file, self._path = file, path

    def read(self, size: int | None = -1) -> bytes:
        at = self.tell()
        if at > UNPACKED_FREELY and (at > UNPACKED or at > RATIO * self._file.tell()):
            raise GemmaAwqError(
                f"{self._path} unpacks to {at} bytes and more, far too many for its size.",
                "Unpack it yourself, and give the part that is text.",
            )
        return super().read(size)


def rows_of(path: Path, kind: Kind, column: str | None = None, rng: random.Random | None = None) -> Iterator[Row]:
    """Yield all rows of a file that is not plain text.

    column: the only column to read of a parquet file; rng: shuffles the order of a parquet file's row groups.
    """
    if kind.suffix in PARQUET:
        yield from _parquet_rows(path, column, rng)
        return
    with unpacked(path, kind) as stream:
        if kind.suffix in LINES:
            yield from line_rows(stream, path)
        elif kind.suffix in JSON:
            yield from _json_rows(stream, path)
        else:
            yield from _table_rows(stream, path, "\t" if kind.suffix == ".tsv" else None)


def line_rows(stream: BinaryIO, path: Path) -> Iterator[Row]:
    """Yield the rows of JSON lines."""
    for number, line in byte_lines(stream, path, _LINES_HINT):
        if number == 1:
            require_utf8_mark(line, path)
        if line.strip():
            where = f"{path}, line {number}"
            yield where, line_of_json(line, where)


def line_of_json(line: bytes, where: object) -> Any:
    """Return a line's JSON value, or the error that says why it has none."""
    try:
        return parse_json(decode(line, where), where, _LINES_HINT)
    except GemmaAwqError as error:
        return error


class _Unread:
    """A stream with bytes put back that were read from its beginning."""

    def __init__(self, begun: bytes, stream: BinaryIO) -> None:
        self._begun, self._stream = begun, stream

    def read(self, size: int) -> bytes:
        if not self._begun:
            return self._stream.read(size)
        given, self._begun = self._begun[:size], self._begun[size:]
        return given


def _json_rows(stream: BinaryIO, path: Path) -> Iterator[Row]:
    """Yield the items of an array, or of an object's only list, or JSON lines, which are often named .json."""
    begun = b""
    while (line := stream.readline(LINE_BYTES)) and not begun.strip(b"\xef\xbb\xbf \t\r\n"):
        begun += line
        if len(begun) > LINE_BYTES:
            raise GemmaAwqError(f"{path} begins with more than {LINE_BYTES} bytes of white space.", _JSON_HINT)
    require_utf8_mark(begun, path)
    first = begun.removeprefix(b"\xef\xbb\xbf").strip()
    rest = cast(BinaryIO, _Unread(begun + line, stream))
    if first.startswith(b"["):
        for number, text in json_items(rest, path, _JSON_HINT):
            where = f"{path}, item {number}"
            try:
                yield where, parse_json(text, where, _JSON_HINT)
            except GemmaAwqError as error:
                yield where, error
    elif line.strip() and isinstance(line_of_json(first, path), dict):
        yield from line_rows(rest, path)
    else:
        data = rest.read(len(begun + line)) + stream.read(JSON_BYTES)
        if len(data) > JSON_BYTES:
            raise GemmaAwqError(f"{path} is one JSON value of more than {JSON_BYTES} bytes.", _JSON_HINT)
        yield from _value_rows(parse_json(decode(data, path), path, _JSON_HINT), path)


def _value_rows(value: Any, path: Path) -> Iterator[Row]:
    lists = [
        name
        for name, items in (value.items() if isinstance(value, dict) else ())
        if isinstance(items, list) and items and isinstance(items[0], dict)
    ]
    if len(lists) == 1 and lists[0] not in KEYS:
        for number, item in enumerate(value[lists[0]], 1):
            yield f"{path}, {lists[0]} {number}", item
    else:
        yield path, value


def _table_rows(stream: BinaryIO, path: Path, delimiter: str | None) -> Iterator[Row]:
    """Yield the rows of a table with a header, as objects of strings."""
    csv.field_size_limit(LINE_BYTES)
    read = 0  # bytes since the last row

    def lines() -> Iterator[str]:
        nonlocal read
        for number, line in byte_lines(stream, path, _TABLE_HINT):
            if number == 1:
                require_utf8_mark(line, path)
            read += len(line)
            if read > LINE_BYTES:
                raise GemmaAwqError(
                    f"{path}, line {number} belongs to a row of more than {LINE_BYTES} bytes.", _TABLE_HINT
                )
            # bytes that are not UTF-8 become surrogates, so that only this row is an error
            yield line.decode("utf-8", "surrogateescape") + "\n"

    text = lines()
    blank, header = 0, ""
    for header in text:
        if header.strip():
            break
        blank += 1
    found = delimiter or max(_DELIMITERS, key=header.count)
    table = csv.reader(chain([header], text), delimiter=found, strict=True)
    columns: list[str] | None = None
    while True:
        where = f"{path}, line {blank + table.line_num + 1}"
        read = 0
        try:
            fields = next(table)
        except StopIteration:
            return
        except csv.Error as error:
            if columns is None:
                raise GemmaAwqError(f"{path} has an invalid header: {error}.", _TABLE_HINT) from None
            yield where, GemmaAwqError(f"{where} is not a valid row: {error}.", _TABLE_HINT)
            continue
        if columns is None:
            columns = [name.strip() for name in fields]
        elif any(fields):
            yield where, _table_row(columns, fields, where)


def _table_row(columns: Sequence[str], fields: Sequence[str], where: str) -> Any:
    if len(fields) > len(columns):
        return GemmaAwqError(f"{where} has {len(fields)} fields, but the header has {len(columns)}.", _TABLE_HINT)
    row = dict(zip(columns, fields, strict=False))
    if any(_UNDECODED.search(field) for field in fields):
        return GemmaAwqError(f"{where} is not UTF-8.", "Convert the file to UTF-8.")
    return row


@contextmanager
def _parquet_errors(path: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (*VALIDATION_ERRORS, pyarrow.lib.ArrowException) as error:
        raise GemmaAwqError(f"{path} is not a valid parquet file: {first_line(error)}.", "Write it again.") from error


def _parquet_rows(path: Path, column: str | None, rng: random.Random | None) -> Iterator[Row]:
    """Yield the rows of a parquet file: only the columns that can hold a text, a few rows in memory at a time."""
    require_regular(path, HINT)
    if find_spec("pyarrow") is None:
        raise GemmaAwqError(
            f"{path} is a Parquet file, and reading it needs pyarrow, which is not installed.",
            f"{install_hint('datasets')}. Or convert the file to .jsonl.",
        )
    with _parquet_errors(path):
        import pyarrow.parquet

        file = pyarrow.parquet.ParquetFile(path, buffer_size=_PARQUET_BUFFER, pre_buffer=False)
        names = [str(name) for name in file.schema_arrow.names]
        counts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    if column is not None and column not in names:
        raise GemmaAwqError(f"{path} has no text column {column!r}.", f"It has: {', '.join(names[:20])}.")
    wanted = [column] if column is not None else [name for name in names if name in KEYS]
    if not wanted:  # every row would be this error
        yield path, dict.fromkeys(names)
        return
    order = list(range(len(counts)))
    if rng is not None:
        rng.shuffle(order)
    with file:
        for group in order:
            number = sum(counts[:group])
            with _parquet_errors(path):
                batches = file.iter_batches(_BATCH, row_groups=[group], columns=wanted, use_threads=False)
            while True:
                with _parquet_errors(path):
                    batch = next(batches, None)
                    rows = [] if batch is None else batch.to_pylist()
                if batch is None:
                    break
                for row in rows:
                    number += 1
                    yield f"{path}, row {number}", row
