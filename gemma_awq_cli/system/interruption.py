"""Ctrl-C, SIGTERM and SIGHUP: how they end the program, and what they must not leave half-done.

The first signal raises, so that the program can keep and report what is done. A signal that comes during work that has
to be completed (`finishing`) or during an import waits for its end; a second one ends the process at once. Signals that
were ignored when the process began, as under nohup or in the background of a script, stay ignored.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from gemma_awq_cli.errors import Terminated

_HEEDED = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_depth = 0  # of nested `finishing` blocks
_held: int | None = None  # the signal that waits
_AGAIN_SECONDS = 0.05  # after which a signal that came during an import is sent again
_REPLACED_SECONDS = 1.0  # in which an exception that took the place of a signal's arrives
_raised: tuple[int, float] | None = None  # the last signal that raised, and when
_returns = False  # whether the next signal is one that waited
_receive: Callable[[BaseException], bool] | None = None  # what takes a signal's exception instead of its being raised


def heed() -> dict[int, Any]:
    """Let the signals raise. Returns the earlier handlers, by signal."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread receives signals
        return {}
    sys.unraisablehook = _on_unraisable
    before = {number: signal.getsignal(number) for number in _HEEDED}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _on_signal)
    return before


@contextmanager
def heeded() -> Iterator[None]:
    """Let the signals raise inside, and restore the earlier handlers afterwards."""
    global _depth, _held, _raised
    before = heed()
    try:
        yield
    finally:
        _depth, _held, _raised = 0, None, None
        sys.unraisablehook = sys.__unraisablehook__
        for number, handler in before.items():
            if handler is not None:  # a handler from outside Python cannot be set again
                signal.signal(number, handler)


@contextmanager
def finishing() -> Iterator[None]:
    """Complete the work inside: a signal waits until it is done, a second one ends the process."""
    global _depth, _held
    _depth += 1
    try:
        yield
    except BaseException:
        _depth -= 1
        if not _depth:
            _held = None  # an exception is on its way already
        raise
    _depth -= 1
    if not _depth and _held is not None:
        number, _held = _held, None
        raise _exception(number)


@contextmanager
def handed_to(receive: Callable[[BaseException], bool]) -> Iterator[None]:
    """Hand the exception of a signal to `receive`, which says whether it takes it, instead of raising it inside.

    For an event loop: what is raised wherever its code happens to be may end one of its tasks, and nothing else. What
    was taken is raised at the latest when the block ends.
    """
    global _receive
    taken: list[BaseException] = []

    def take(error: BaseException) -> bool:
        if receive(error):
            taken.append(error)
        return bool(taken)

    _receive = take
    try:
        yield
    finally:
        _receive = None
    if taken:
        raise taken[0]


def end() -> None:
    """Mark that only the process's end is left: from here on a signal waits, and a second one ends the process."""
    global _depth
    _depth += 1


def replaced() -> int | None:
    """Return the signal that raised a moment ago, or None.

    A library's C code that calls Python may replace the signal's exception by one of its own. Such an exception is no
    failure: it stands for that signal.
    """
    if _raised is None or time.monotonic() - _raised[1] > _REPLACED_SECONDS:
        return None
    return _raised[0]


def exit_code(number: int) -> int:
    """Return the exit code that a shell reports for a process that a signal ended."""
    return 128 + number


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _held, _returns
    first, _returns = _held is None or _returns, False
    if not first:
        os._exit(exit_code(number))
    if _depth:
        _held = number
    elif _is_importing(frame):
        # A module whose import was interrupted cannot be imported again, but libraries try.
        _held = number
        _send_again(number)
    else:
        _held = None
        error = _exception(number)
        if _receive is None or not _receive(error):
            raise error


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _send_again(number: int) -> None:
    def send() -> None:
        global _returns
        if _held is None:  # the command has ended in the meantime
            return
        _returns = True
        os.kill(os.getpid(), number)

    timer = threading.Timer(_AGAIN_SECONDS, send)
    timer.daemon = True
    timer.start()


def _on_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """Send a signal again that came while an object was being destroyed, where an exception has no effect."""
    global _held
    if not isinstance(unraisable.exc_value, KeyboardInterrupt | Terminated):
        sys.__unraisablehook__(unraisable)
        return
    _held = getattr(unraisable.exc_value, "number", int(signal.SIGINT))
    _send_again(_held)


def _exception(number: int) -> BaseException:
    global _raised
    _raised = number, time.monotonic()
    return KeyboardInterrupt() if number == signal.SIGINT else Terminated(number)
