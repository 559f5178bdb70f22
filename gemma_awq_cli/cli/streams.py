"""Standard streams that are safe to use during a command.

Nothing crashes if the encoding lacks a character, a stream is closed, the disk is full, or the reader of a pipe leaves.
Losing standard output, which carries the result, ends the command. Losing standard error does not: hours of work go on
without an audience.

Text that others write here (Typer's usage errors, the warnings and progress bars of libraries) passes the terminal's
filter. `console.py` filters its text by kind and then writes it with `put`.
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
    """Standard output or standard error, in the place of the stream in `sys`."""

    def __init__(self, stream: TextIO, carries_result: bool) -> None:
        self._stream = stream
        self._carries_result = carries_result
        self._lost: OSError | None = None

    def write(self, text: str) -> int:
        """Filter and write text that does not come from `console.py`."""
        if not isinstance(text, str):
            raise TypeError(f"expected str, not {type(text).__name__}")
        if self.isatty():
            self.put(terminal.library(text))
        else:
            self.put(text if self._carries_result else terminal.message(text))
        return len(text)

    def put(self, text: str) -> None:
        """Write text as it is."""
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
        # at each call: a library may have caught the first error
        if isinstance(self._lost, BrokenPipeError):
            raise ReaderLeft from None
        hint = "Free some disk space." if disk_is_full(self._lost) else "Check the redirection: > FILE or | COMMAND."
        raise GemmaAwqError(f"Standard output cannot be written: {reason_of(self._lost)}.", hint) from None

    def isatty(self) -> bool:
        return self._stream.isatty()

    def __getattr__(self, name: str) -> Any:
        if name == "buffer":  # bytes would bypass the filter
            raise AttributeError(name)
        return getattr(self._stream, name)


class AsIs:
    """A standard stream for rich, which gets filtered text and adds colours that must not be filtered."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        put(self._stream, text)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def put(stream: Any, text: str) -> None:
    """Write text without filtering it, to one of `standard_streams` or to any other stream."""
    (stream.put if isinstance(stream, StandardStream) else stream.write)(text)


@contextmanager
def standard_streams() -> Iterator[None]:
    """Replace the standard streams with safe ones, and restore them afterwards."""
    _open_closed_streams()
    before = sys.stdin, sys.stdout, sys.stderr
    handlers = [stream.errors if isinstance(stream, io.TextIOWrapper) else None for stream in before[1:]]
    # Python has None in `sys` for a stream that was closed when the process started
    stdin = before[0] or open(os.devnull, encoding="utf-8")  # noqa: SIM115 (lives as long as the process)
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


def _open_closed_streams() -> None:
    """Open the descriptors that were closed (`>&-`), or the next file to be opened would get the number and the output.

    Standard output is opened read-only, so that writing fails as it does on a closed one. Standard input is empty, and
    standard error leads nowhere.
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
    """Discard what is still in the buffers, so that Python does not fail to flush it when the process ends."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _unencodable(error: UnicodeError) -> tuple[bytes, int]:
    """Encode characters that the encoding lacks as escapes, and bytes of a name that is not UTF-8 as themselves."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    parts = [
        bytes([ord(character) - 0xDC00]) if "\udc80" <= character <= "\udcff"
        else terminal.escaped(character).encode("ascii")
        for character in error.object[error.start : error.end]
    ]  # fmt: skip
    return b"".join(parts), error.end


codecs.register_error(UNENCODABLE, _unencodable)
