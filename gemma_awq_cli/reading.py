"""What comes from outside, read with bounds: bytes of a regular file, text, JSON, and the errors that come with them.

Everything that another person wrote passes through here once. After it, a value is what its reader was promised, and
whatever was wrong has become a `GemmaAwqError` that names the file. Imports nothing heavy.
"""

import errno
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from gemma_awq_cli.errors import GemmaAwqError

JSON_BYTES = 64 * 1024 * 1024  # the largest released tokenizer.json has 33 MB, everything else is far smaller
JSON_DEPTH = 64
_BOMS = {
    b"\xff\xfe\x00\x00": "UTF-32", b"\x00\x00\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16",
}  # fmt: skip
_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
# What a library's own validation of a stranger's values raises. Not Exception: an interrupt or an assertion of ours is
# no answer to a file.
VALIDATION_ERRORS = (
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, RuntimeError, OSError,
    ImportError, MemoryError,
)  # fmt: skip


@contextmanager
def system_errors(what: str | Path, hint: str, doing: str = "read") -> Iterator[None]:
    """Turn whatever the operating system refuses inside into an error that names `what`, with `hint`."""
    try:
        yield
    except OSError as error:
        raise GemmaAwqError(f"{what} cannot be {doing}: {reason_of(error)}.", hint) from error
    except ValueError as error:  # a path with a NUL character
        if "null" not in str(error):
            raise
        raise GemmaAwqError(f"{what!r} is not a path: it holds a NUL character.", hint) from error


@contextmanager
def library_errors(what: str, hint: str) -> Iterator[None]:
    """Turn what a library raises over a stranger's values into an error `what`: its reason. Wraps one call, no more."""
    try:
        yield
    except VALIDATION_ERRORS as error:
        raise GemmaAwqError(f"{what}: {first_line(error)}", hint) from error


def reason_of(error: OSError) -> str:
    """The system's own words for an error."""
    return error.strerror or first_line(error)


def first_line(error: BaseException, limit: int = 300) -> str:
    """The first line of an exception's text, shortened; its type where it has no text."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    line = lines[0].strip() or type(error).__name__
    return line if len(line) <= limit else f"{line[:limit]}..."


def disk_is_full(error: OSError) -> bool:
    return error.errno in _FULL


def is_refused(error: OSError) -> bool:
    """Whether permissions or a read-only file system are the reason."""
    return error.errno in _REFUSED


def home_path(text: str) -> Path:
    """A path as people write it: `~` is the home folder. The home of nobody is a path that is not there."""
    return Path(os.path.expanduser(text))  # Path.expanduser raises for it


def read_bytes(path: Path, hint: str, limit: int | None = None) -> bytes:
    """A regular file's bytes, at most `limit`. A device or a pipe, which need not end, is an error."""
    with system_errors(path, hint), open(path, "rb", opener=_open_regular) as file:
        size = os.fstat(file.fileno()).st_size
        if limit is not None and size > limit:
            raise GemmaAwqError(f"{path} has {size} bytes; at most {limit} are read.", hint)
        return file.read()


def require_regular(path: Path, hint: str) -> None:
    """An error unless `path` is a regular file, through whatever links; opens nothing."""
    with system_errors(path, hint):
        mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise GemmaAwqError(f"{path} is not a regular file.", hint)


def _open_regular(path: str, flags: int) -> int:
    # a pipe without a writer would keep open() waiting
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file")
    return descriptor


def decode(data: bytes, where: str | Path, hint: str = "Convert it to UTF-8.") -> str:
    """UTF-8 text, without the byte order mark that some editors put before it; line ends stay as they are."""
    for mark, name in _BOMS.items():
        if data.startswith(mark):
            raise GemmaAwqError(f"{where} is {name}, not UTF-8.", hint)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise GemmaAwqError(f"{where} is not UTF-8: byte 0x{data[error.start]:02x} in line {line}.", hint) from None


def read_text(path: Path, hint: str, limit: int | None = None) -> str:
    """A regular file's UTF-8 text; see `read_bytes` and `decode`."""
    return decode(read_bytes(path, hint, limit), path)


def lines_of(text: str) -> list[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1.

    Only \\n and \\r\\n end a line: U+2028, U+0085 and the like are characters of the text, inside JSON strings too.
    """
    return [(number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def parse_json(text: str, where: str | Path, hint: str, depth: int = JSON_DEPTH) -> Any:
    """A JSON value; an error that names `where` for what is not JSON, or cannot be held as text again.

    Bounded: nesting by `depth`, integers by Python's own limit of digits. NaN and Infinity are not JSON.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise GemmaAwqError(f"{where} is nested too deeply.", hint) from None
    except ValueError as error:  # JSONDecodeError is one, and so is an integer of too many digits
        raise GemmaAwqError(f"{where} is not valid JSON: {first_line(error)}.", hint) from None
    _require_sound(value, where, hint, depth, surrogates=_ESCAPED_SURROGATE.search(text) is not None)
    return value


def parse_json_object(text: str, where: str | Path, hint: str) -> dict[str, Any]:
    """A JSON object; see `parse_json`."""
    value = parse_json(text, where, hint)
    if not isinstance(value, dict):
        raise GemmaAwqError(f"{where} does not hold a JSON object.", hint)
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


def _require_sound(value: Any, where: str | Path, hint: str, depth: int, surrogates: bool) -> None:
    """Nesting within `depth`, and no half of a surrogate pair in any text."""
    level = [value]
    for levels_left in range(depth, -1, -1):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += item.values()
                if surrogates:
                    below += item
            elif isinstance(item, list):
                below += item
            elif surrogates and isinstance(item, str) and _SURROGATE.search(item):
                raise GemmaAwqError(f"{where} holds half of a surrogate pair.", hint)
        if not levels_left and any(isinstance(item, dict | list) for item in level):
            break
        if not below:
            return
        level = below
    raise GemmaAwqError(f"{where} is nested too deeply.", hint)


def unforeseen(error: OSError | MemoryError) -> GemmaAwqError:
    """The error for what the system refused in a place that foresaw no refusal: its words, and the file if it has one.

    For the outermost boundaries alone: whoever knows what was being done says more.
    """
    if isinstance(error, MemoryError):
        return GemmaAwqError("Out of memory.", "Close other programs, or take a smaller model or a larger machine.")
    named = [str(name) for name in (error.filename, error.filename2) if name is not None]
    message = f"{' -> '.join(named)}: {reason_of(error)}." if named else f"{reason_of(error)}."
    hints = {
        errno.EFBIG: "Raise the limit on the size of files (ulimit -f).",
        errno.EMFILE: "Raise the limit on open files (ulimit -n).",
        errno.ENAMETOOLONG: "Give a shorter path.",
        errno.EAGAIN: "Raise the limit on processes (ulimit -u), or end some.",
    }
    if disk_is_full(error):
        hint = "Free some space."
    elif is_refused(error):
        hint = "Change its permissions, or work as a user who may."
    else:
        hint = hints.get(error.errno or 0, "Check the path, the disk and the network that it is on.")
    return GemmaAwqError(message, hint)
