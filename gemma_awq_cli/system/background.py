"""Work on a thread of its own, while the caller does something else."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def begin(work: Callable[[], T]) -> Future[T]:
    """Begin some work; what it returns or raises comes out of the future.

    The thread ends with the work. An executor's would wait for more, and for ever if a signal came while it started.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 (the caller hears of it)
            future.set_exception(error)

    threading.Thread(target=run).start()
    return future
