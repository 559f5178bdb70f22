"""The errors of the operating system and of libraries, as `GemmaAwqError`s that name what was being done."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gemma_awq_cli.errors import GemmaAwqError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)
# What a library's own validation of a stranger's values raises. Not Exception: an interrupt or a failed assertion of
# ours says nothing about a file.
VALIDATION_ERRORS = (
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, RuntimeError, OSError,
    ImportError, MemoryError,
)  # fmt: skip


@contextmanager
def system_errors(what: str | Path, hint: str, doing: str = "read") -> Iterator[None]:
    """Turn OSErrors raised inside into errors that name `what`, with `hint`. doing: a past participle, such as read."""
    try:
        yield
    except OSError as error:
        raise GemmaAwqError(f"{what} cannot be {doing}: {reason_of(error)}.", hint) from error
    except ValueError as error:  # a path with a NUL character
        if "null" not in str(error):
            raise
        raise GemmaAwqError(f"{str(what)!r} is not a path: it holds a NUL character.", hint) from error


@contextmanager
def library_errors(what: str, hint: str) -> Iterator[None]:
    """Turn what a library raises over a stranger's values into the error `what`: reason. To be put around one call."""
    try:
        yield
    except VALIDATION_ERRORS as error:
        raise GemmaAwqError(f"{what}: {first_line(error)}", hint) from error


def reason_of(error: OSError) -> str:
    """Return the operating system's words for an error."""
    return error.strerror or first_line(error)


def first_line(error: BaseException, limit: int = 300) -> str:
    """Return the first line of an exception's text, at most `limit` characters of it; its type if it has no text."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    line = lines[0].strip() or type(error).__name__
    return line if len(line) <= limit else f"{line[:limit]}..."


def disk_is_full(error: OSError) -> bool:
    """Whether a full disk or quota is the reason."""
    return error.errno in _FULL


def is_permission_error(error: OSError) -> bool:
    """Whether permissions or a read-only file system are the reason."""
    return error.errno in _PERMISSION


def unforeseen_error(error: OSError | MemoryError) -> GemmaAwqError:
    """Return the message for a system's error that no code closer to it has handled: its words, and its files.

    Only for the outermost boundaries: code that knows what was being done can say more.
    """
    if isinstance(error, MemoryError):
        return GemmaAwqError(
            "Out of memory.", "Close other programs, or use a smaller model or a machine with more memory."
        )
    named = [str(name) for name in (error.filename, error.filename2) if name is not None]
    message = f"{' -> '.join(named)}: {reason_of(error)}." if named else f"{reason_of(error)}."
    hints = {
        errno.EFBIG: "Raise the limit on the size of files (ulimit -f).",
        errno.EMFILE: "Raise the limit on open files (ulimit -n).",
        errno.ENAMETOOLONG: "Give a shorter path.",
        errno.EAGAIN: "Raise the limit on processes (ulimit -u), or end some of them.",
    }
    if disk_is_full(error):
        hint = "Free some space."
    elif is_permission_error(error):
        hint = "Change its permissions, or run the command as a user who has them."
    else:
        hint = hints.get(error.errno or 0, "Check the path, and the disk or network that it is on.")
    return GemmaAwqError(message, hint)
