"""One of several processes that share out rows: they exchange tensors by the collective operations of PyTorch's gloo.

An operation runs on gloo's threads, while this one looks again and again whether it is done: signals are heeded so, and
a process that is lost is noticed. Sums are added in the order of the processes, so they are the same everywhere and
every time; gloo's own sums depend on the number of processes and on its algorithm. Tensors travel as raw numbers on the
CPU: what another process says is never executed.
"""

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from gemma_awq_cli.awq.row_shares import RowShares
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.quantize.processes import JOIN_SECONDS, Group, lost
from gemma_awq_cli.system.failures import first_line

LONGEST = timedelta(days=30)  # of one operation: whether the others live is known from their signs of life
FIRST_LOOK_SECONDS, LOOK_SECONDS = 0.0002, 0.01  # between two looks whether an operation is done: first, and at most
BUFFER_BYTES = 2**26  # of the rows of all processes that travel at a time


class RowExchange(RowShares):
    """The shares of the processes of a group. engine: gloo's process group."""

    def __init__(self, group: Group, engine: Any) -> None:
        self.rank, self.count = group.process.rank, group.process.count
        self._group, self._engine = group, engine

    def add_up(self, tensor: Tensor) -> None:
        size = tensor.numel()
        width = -(-size // self.count)  # of the piece that each process adds up
        given = torch.zeros(width * self.count, dtype=tensor.dtype)
        given[:size] = tensor.reshape(-1)
        pieces = torch.empty_like(given)
        self._finish(self._engine.alltoall_base(pieces, given, [], []))
        first, *others = pieces.split(width)
        for other in others:
            first += other
        self._finish(self._engine._allgather_base(given, first))
        tensor.copy_(given[:size].view(tensor.shape))

    def total(self, number: float) -> float:
        return sum(self._gather(torch.tensor([number], dtype=torch.float64)).tolist())

    def fill(self, tensor: Tensor) -> None:
        slices = [self.of(rank, len(tensor)) for rank in range(self.count)]
        most, row_bytes = max(part.stop - part.start for part in slices), tensor[:1].nbytes
        step = max(1, BUFFER_BYTES // max(1, row_bytes * self.count))
        for first in range(0, most, step):
            places = [slice(min(part.start + first, part.stop), min(part.start + first + step, part.stop))
                      for part in slices]  # fmt: skip
            given = torch.zeros(min(step, most - first), *tensor.shape[1:], dtype=tensor.dtype)
            own = tensor[places[self.rank]]
            given[: len(own)] = own
            for rank, (place, rows) in enumerate(zip(places, self._gather(given).chunk(self.count), strict=True)):
                if rank != self.rank:
                    tensor[place] = rows[: place.stop - place.start].to(tensor.device)

    def of_first(self, tensor: Tensor) -> Tensor:
        return self._gather(tensor.to("cpu"))[: len(tensor)].to(tensor.device)

    def wait(self) -> None:
        self.total(0)

    def _gather(self, own: Tensor) -> Tensor:
        """The tensors of all processes, one after another."""
        gathered = torch.empty(self.count * len(own), *own.shape[1:], dtype=own.dtype)
        self._finish(self._engine._allgather_base(gathered, own.contiguous()))
        return gathered

    def _finish(self, work: Any) -> None:
        """Wait for an operation. Raises GemmaAwqError if a process is lost meanwhile."""
        pause = FIRST_LOOK_SECONDS
        while not work.is_completed():
            self._group.require_all()
            time.sleep(pause)
            pause = min(2 * pause, LOOK_SECONDS)
        try:
            work.wait()
        except RuntimeError as error:  # the connection has ended, and with it the process at its other end
            raise lost("A process of this run has ended.") from error


@contextmanager
def exchanging(group: Group) -> Iterator[RowExchange]:
    """Connect the processes of a group to each other. Raises GemmaAwqError if they cannot reach each other."""
    engine = _connected(group)
    engine._set_default_timeout(LONGEST)
    try:
        yield RowExchange(group, engine)
    except BaseException:
        # an operation may never end now, and the engine's end would wait for it: the process ends without
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(engine))
        raise


def _connected(group: Group) -> Any:
    """Gloo's process group of the processes of a group. It is made on another thread, as making it heeds no signal."""
    import torch.distributed

    dist: Any = torch.distributed  # whose process groups are exported without types
    made: list[Any] = []

    def make() -> None:
        process, store = group.process, dist.PrefixStore("rows", group.store)
        try:
            made.append(dist.ProcessGroupGloo(store, process.rank, process.count, timedelta(seconds=JOIN_SECONDS)))
        except (RuntimeError, ValueError) as error:
            made.append(error)

    threading.Thread(target=make, daemon=True).start()
    while not made:
        group.require_all()
        time.sleep(FIRST_LOOK_SECONDS)
    if isinstance(made[0], Exception):
        group.require_all()
        raise GemmaAwqError(
            f"Process {group.process.rank} cannot exchange tensors with the others: {first_line(made[0])}",
            "Each machine must reach the others by their host names, on any port. GLOO_SOCKET_IFNAME names the "
            "network interface to use.",
        ) from made[0]
    return made[0]
