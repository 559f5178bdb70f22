"""Work that is launched again and again on the same buffers, recorded once where the device can replay it.

On CUDA that is a CUDA graph: one launch instead of hundreds. Elsewhere the same work simply runs again. All that is
known here of the work is that it takes no arguments and leaves its results in its buffers.
"""

from collections.abc import Callable, Hashable
from typing import Any

import torch


class Recorder:
    """Runs works by name on one device, and replays those that came before.

    failure: why a recording failed, after which nothing is recorded any more.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}  # None: it ran once, which compiles its kernels
        self._pool: Any = None
        self.failure: str | None = None

    def run(self, name: Hashable, work: Callable[[], None]) -> None:
        """Run a work. It must launch the same kernels on the same memory whenever it has this name, and never wait."""
        if self._device.type != "cuda" or self.failure is not None:
            work()
        elif name not in self._graphs:
            work()
            self._graphs[name] = None
        elif (graph := self._graphs[name] or self._record(name, work)) is not None:
            graph.replay()
        else:
            work()

    def _record(self, name: Hashable, work: Callable[[], None]) -> "torch.cuda.CUDAGraph | None":
        """The graph of a work; None if it cannot be recorded."""
        self._pool = self._pool or torch.cuda.graph_pool_handle()  # one memory for all: they never run together
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(self._device), torch.cuda.graph(graph, pool=self._pool):
                work()
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            self.failure = str(error).strip().partition("\n")[0]
            return None
        self._graphs[name] = graph
        return graph
