"""The errors of the operating system and of libraries, as `GemmaAwqError`s that name what was being done."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gemma_awq_cli.errors import GemmaAwqError

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
