"""Work on a thread of its own, while the caller does something else."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def begin(work: Callable[[], T]) -> Future[T]:
    """Begin some work; what it returns or raises comes out of the future."""
    worker = ThreadPoolExecutor(1)
    future = worker.submit(work)
    worker.shutdown(wait=False)
    return future
