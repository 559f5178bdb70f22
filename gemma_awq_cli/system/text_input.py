"""Text from outside: bytes decoded as UTF-8, whole or line by line within bounds."""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.system.reading import read_bytes

LINE_BYTES = 16 * 1024 * 1024  # of one line of a file of many
_BLOCK = 1 << 16
_BOMS = {
    b"\xff\xfe\x00\x00": "UTF-32", b"\x00\x00\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16",
}  # fmt: skip


def decode(data: bytes, where: object, hint: str = "Convert it to UTF-8.") -> str:
    """UTF-8 text, without the byte order mark that some editors put before it; line ends stay as they are."""
    require_utf8_mark(data, where, hint)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        place = f" in line {line}" if b"\n" in data else ""
        raise GemmaAwqError(f"{where} is not UTF-8: byte 0x{data[error.start]:02x}{place}.", hint) from None


def require_utf8_mark(data: bytes, where: object, hint: str = "Convert it to UTF-8.") -> None:
    """An error if the bytes begin as UTF-16 or UTF-32 text does."""
    for mark, name in _BOMS.items():
        if data.startswith(mark):
            raise GemmaAwqError(f"{where} is {name}, not UTF-8.", hint)


def read_text(path: Path, hint: str, limit: int | None = None) -> str:
    """A regular file's UTF-8 text; see `read_bytes` and `decode`."""
    return decode(read_bytes(path, hint, limit), path)


def require_text(text: str, where: object, hint: str = "Convert it to UTF-8 text.") -> str:
    """`text`; an error if it holds a NUL, as binary files do and UTF-16 without its mark does."""
    if (at := text.find("\0")) >= 0:
        line = text.count("\n", 0, at) + 1
        raise GemmaAwqError(f"{where} is not text: it has a NUL character in line {line}.", hint)
    return text


def plain_lines(text: str) -> str:
    """The text with \\n at the end of every line, where it has \\r\\n or an old Mac's \\r."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def byte_lines(stream: BinaryIO, where: object, hint: str, limit: int = LINE_BYTES) -> Iterator[tuple[int, bytes]]:
    """The lines of a stream, one at a time, blank ones too: their numbers from 1 and their bytes.

    Only \\n and \\r\\n end a line, and \\r where the text begins without any \\n: U+2028, U+0085 and the like are
    characters of the text, inside JSON strings too. A byte order mark before a line, as joined files have it, is left
    out.
    A line of more than `limit` bytes is an error. Raises what reading the stream raises.
    """
    block = stream.read(_BLOCK)
    end = b"\r" if b"\n" not in block and b"\r" in block else b"\n"
    mark = "\ufeff".encode()
    number, begun = 0, b""
    while block:
        if block.isspace() and not begun:  # pages of blank lines are nobody's text
            number += block.count(end)
            block = stream.read(_BLOCK)
            continue
        *whole, begun = (begun + block).split(end) if end in block else (begun + block,)
        for line in whole:
            number += 1
            yield number, line.removeprefix(mark).removesuffix(b"\r")
        if len(begun) > limit:
            raise GemmaAwqError(f"{where}, line {number + 1} has more than {limit} bytes.", hint)
        block = stream.read(_BLOCK)
    if begun:
        yield number + 1, begun.removeprefix(mark).removesuffix(b"\r")
