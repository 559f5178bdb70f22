"""The standard streams for the time of a command.

Whatever is wrong with them, nothing crashes: a text that the encoding lacks, an end that is closed, a disk that is
full, a reader that leaves. Standard output carries the result, so its loss ends the command; standard error carries
what is said meanwhile, and work of hours does not end because nobody listens.

What is written here by itself (Typer's usage errors, libraries' warnings and bars) passes the terminal's filter;
`console.py`, which filters by what a text is, writes with `put`.
"""

import codecs
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from gemma_awq_cli.cli import terminal
from gemma_awq_cli.errors import GemmaAwqError, ReaderLeft
from gemma_awq_cli.system.failures import disk_is_full, reason_of

UNENCODABLE = "gemma-awq"  # the error handler's name


class StandardStream:
    """Standard output or standard error, as `sys` gives it to everybody."""

    def __init__(self, stream: TextIO, carries_result: bool) -> None:
        self._stream = stream
        self._carries_result = carries_result
        self._lost: OSError | None = None

    def write(self, text: str) -> int:
        """What somebody else than `console.py` writes."""
        if not isinstance(text, str):
            raise TypeError(f"text is needed, not {type(text).__name__}")
        if self.isatty():
            self.put(terminal.library(text))
        else:
            self.put(text if self._carries_result else terminal.message(text))
        return len(text)

    def put(self, text: str) -> None:
        """Text that is already as it is to be."""
        self._do(lambda: self._stream.write(text))

    def flush(self) -> None:
        self._do(self._stream.flush)

    def _do(self, act: Callable[[], object]) -> None:
        if self._lost is None:
            try:
                act()
            except OSError as error:
                self._lost = error
                _let_go(self._stream)
        if self._lost is None or not self._carries_result:
            return
        # every time: whoever asked first may have been a library that only tried
        if isinstance(self._lost, BrokenPipeError):
            raise ReaderLeft from None
        hint = "Free some space." if disk_is_full(self._lost) else "Check where it leads: > FILE, or | COMMAND."
        raise GemmaAwqError(f"Standard output cannot be written: {reason_of(self._lost)}.", hint) from None

    def isatty(self) -> bool:
        return self._stream.isatty()

    def __getattr__(self, name: str) -> Any:
        if name == "buffer":  # nothing goes past the filter
            raise AttributeError(name)
        return getattr(self._stream, name)


class AsIs:
    """A standard stream for a library that is given filtered text and adds its own colours."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        put(self._stream, text)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def put(stream: Any, text: str) -> None:
    """Write text past the filter, to a standard stream of `standard_streams` or any other."""
    (stream.put if isinstance(stream, StandardStream) else stream.write)(text)


@contextmanager
def standard_streams() -> Iterator[None]:
    """The streams are safe to use inside, and as before after it."""
    _open_closed_ends()
    before = sys.stdin, sys.stdout, sys.stderr
    handlers = [stream.errors if isinstance(stream, io.TextIOWrapper) else None for stream in before[1:]]
    # a process that was started with an end closed has no stream there
    stdin = before[0] or open(os.devnull, encoding="utf-8")  # noqa: SIM115 (as long as the process)
    stdout, stderr = (
        stream or open(number, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        for number, stream in enumerate(before[1:], 1)
    )
    for stream in (stdout, stderr):
        _set_handler(stream, UNENCODABLE)
    sys.stdin = stdin
    sys.stdout, sys.stderr = StandardStream(stdout, True), StandardStream(stderr, False)  # type: ignore[assignment]
    try:
        yield
    finally:
        for wrapped in (sys.stdout, sys.stderr):
            with suppress(GemmaAwqError, ReaderLeft, OSError):
                wrapped.flush()
        for stream, handler in zip((stdout, stderr), handlers, strict=True):
            _set_handler(stream, handler)
        sys.stdin, sys.stdout, sys.stderr = before


def _open_closed_ends() -> None:
    """Open what was closed (`>&-`), or the next file that is opened takes its number, and what is printed.

    Standard output refuses to be written, as a closed one does; nothing is in standard input, and nobody misses what
    goes to standard error.
    """
    for number, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, flags)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)


def _set_handler(stream: TextIO, handler: str | None) -> None:
    if handler is not None and isinstance(stream, io.TextIOWrapper):
        with suppress(OSError, ValueError):
            stream.reconfigure(errors=handler)


def _let_go(stream: TextIO) -> None:
    """What is still in the buffers goes nowhere, so that the end of the process does not complain of it."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _unencodable(error: UnicodeError) -> tuple[bytes, int]:
    """What an encoding lacks as its escape; the bytes of a file name that is no UTF-8 as they are."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    parts = [
        bytes([ord(character) - 0xDC00]) if "\udc80" <= character <= "\udcff"
        else terminal.escaped(character).encode("ascii")
        for character in error.object[error.start : error.end]
    ]  # fmt: skip
    return b"".join(parts), error.end


codecs.register_error(UNENCODABLE, _unencodable)
