"""Rows of float32 numbers in files, of which a GPU may hold a copy.

What a GPU holds is read from there, without the disk and the bus, and its file is written in another thread, so that
the GPU computes meanwhile. Nobody needs the file before the run that reads it again after an interruption.
"""

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.journal import ANEW
from gemma_awq_cli.models.checkpoints.weight_files import raw_bytes
from gemma_awq_cli.models.forward.memory import is_refusal
from gemma_awq_cli.system.reading import require_regular

FLOAT32 = 4  # bytes


def fill(tensor: Tensor, file: BufferedReader) -> None:
    """Read the numbers of a contiguous tensor on the CPU from where a file is; an error if it ends before."""
    if file.readinto(raw_bytes(tensor)) != tensor.nbytes:
        raise GemmaAwqError(f"{file.name} is too short: something changed it during the run.", ANEW)


@dataclass(frozen=True)
class RowFile:
    """Rows of one shape in float32, one after another in a file."""

    path: Path
    row: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return torch.Size(self.row).numel() * FLOAT32

    def read(self, rows: slice) -> Tensor:
        """Return rows [R, ...]; an error if the file does not hold them all."""
        result = torch.empty((rows.stop - rows.start, *self.row), dtype=torch.float32)
        with self.path.open("rb") as file:
            file.seek(rows.start * self.row_bytes)
            fill(result, file)
        return result

    def write(self, first: int, rows: Tensor) -> None:
        """Write rows [R, ...] from row `first` on. The file must exist."""
        with self.path.open("r+b") as file:
            file.seek(first * self.row_bytes)
            file.write(raw_bytes(rows.to(torch.float32)))

    def require(self, rows: int) -> None:
        """Raise unless an interrupted run left at least this number of rows."""
        require_regular(self.path, ANEW)
        if self.path.stat().st_size < rows * self.row_bytes:
            raise GemmaAwqError(f"{self.path} is too short: something changed it since.", ANEW)

    def sync(self) -> None:
        """Force the file to the disk."""
        with self.path.open("r+b") as file:
            os.fsync(file.fileno())


class Behind:
    """Another thread, which does one thing after the other. What fails there is raised at the next call here."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "written-behind")
        self._pending: deque[Future[None]] = deque()

    def do(self, action: Callable[..., None], *arguments: Any) -> None:
        while self._pending and self._pending[0].done():
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(action, *arguments))

    def wait(self) -> None:
        """Return when all is done."""
        while self._pending:
            self._pending.popleft().result()

    def close(self) -> None:
        """End the thread after what it is doing; what it has not begun is not done."""
        self._pool.shutdown(cancel_futures=True)


class HeldRows:
    """`count` rows of a file, of which a device holds those that were written since.

    If the device has no memory for them, it holds none.
    """

    def __init__(self, file: RowFile, count: int, device: torch.device, behind: Behind) -> None:
        self.path = file.path
        self._file, self._device, self._behind = file, device, behind
        self._copy: Tensor | None = None
        self._is_held = torch.zeros(count, dtype=torch.bool)
        self._refused = False

    def read(self, rows: slice) -> Tensor:
        """Return rows [R, ...] on the device, to be read only; an error if the file is to hold them and does not."""
        if self._copy is not None and bool(self._is_held[rows].all()):
            return self._copy[rows]
        self._behind.wait()
        return self._file.read(rows).to(self._device)

    def write(self, first: int, rows: Tensor) -> None:
        """Write rows [R, ...] from row `first` on. The file, which must exist, has them after `sync`."""
        rows = rows.to(torch.float32)
        if self._copy is None and not self._refused:
            self._copy = self._allocated()
        if self._copy is not None:
            self._copy[first : first + len(rows)] = rows
            self._is_held[first : first + len(rows)] = True
        self._behind.do(self._file.write, first, rows.cpu())

    def require(self, rows: int) -> None:
        """See `RowFile.require`."""
        self._file.require(rows)

    def sync(self) -> None:
        """Force the file to the disk."""
        self._behind.wait()
        self._file.sync()

    def _allocated(self) -> Tensor | None:
        try:
            return torch.empty((len(self._is_held), *self._file.row), dtype=torch.float32, device=self._device)
        except (MemoryError, RuntimeError) as error:
            if not is_refusal(error):
                raise
            self._refused = True
            return None
