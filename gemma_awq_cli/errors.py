"""The errors that a user can meet. Imports nothing, so that every room may raise them.

`message` says what is wrong and where, `hint` says what to do next. Only `cli/app.py` turns them into output and exit
codes.
"""

from collections.abc import Iterable


class GemmaAwqError(Exception):
    """A failure caused by the input or the machine, not by a bug. Shown without a traceback; exit code 1."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class Terminated(BaseException):
    """The process received the signal `number`, from a scheduler (SIGTERM) or a closed terminal (SIGHUP).

    Like Ctrl-C, it stops the work and corrupts nothing.
    """

    def __init__(self, number: int = 15) -> None:
        super().__init__(number)
        self.number = number


class ReaderLeft(BaseException):
    """The reader of standard output has gone, as `head` does, so there is nobody to write the rest for."""


class UsageError(GemmaAwqError):
    """The command line cannot be carried out as it was typed. Exit code 2."""

    exit_code = 2


class ThresholdError(GemmaAwqError):
    """A threshold that the caller set was not met. Exit code 3."""

    exit_code = 3


class NotComparableError(GemmaAwqError):
    """What `verify` is to compare cannot be had. Exit code 4: nothing is known of the artifact."""

    exit_code = 4


def some(names: Iterable[str], shown: int = 5) -> str:
    """Return the first few of many names and the number of the others, for a message."""
    listed = list(names)
    more = len(listed) - shown
    return ", ".join(listed[:shown]) + (f" and {more} more" if more > 0 else "")
