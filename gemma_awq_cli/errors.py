"""The errors a user can meet. Imports nothing, so that every room may raise them.

`message` says what is wrong and why, `hint` says what to do next; `cli.main` is the one place that formats them.
"""

from collections.abc import Iterable


class GemmaAwqError(Exception):
    """A failure that is the input's or the machine's, not a bug: shown without a traceback, exit code 1."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class Terminated(BaseException):
    """A scheduler or a closed terminal asked the process to end (SIGTERM, SIGHUP), by the signal `number`.

    Like Ctrl-C, it stops the work and corrupts nothing.
    """

    def __init__(self, number: int = 15) -> None:
        super().__init__(number)
        self.number = number


class ReaderLeft(BaseException):
    """Whoever read standard output has left, as `head` does: nobody wants the rest."""


class UsageError(GemmaAwqError):
    """The command was typed in a way that cannot be carried out: exit code 2."""

    exit_code = 2


def some(names: Iterable[str], shown: int = 5) -> str:
    """The first few of many names and how many more there are, for a message."""
    listed = list(names)
    more = len(listed) - shown
    return ", ".join(listed[:shown]) + (f" and {more} more" if more > 0 else "")
