"""Writing safetensors files whose names, dtypes and shapes are planned first.

Each tensor is written to its final place in its file as soon as it is known, in any order, so none has to stay in
memory.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.files import INDEX, SINGLE
from gemma_awq_cli.models.checkpoints.headers import DTYPES
from gemma_awq_cli.models.checkpoints.weight_files import raw_bytes

SHARD_BYTES = 4 * 10**9
ALIGNMENT = 8  # bytes, of the beginnings of tensors
FORMAT_NAMES = {getattr(torch, dtype): name for name, (dtype, _) in DTYPES.items()}


@dataclass(frozen=True)
class PlannedTensor:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class TensorWriter:
    """The safetensors files of one folder, written tensor by tensor in any order.

    shard_bytes: the most that a file holds, SHARD_BYTES by default. begun: an earlier writer made the files by the same
    plan; continue them, and name finished tensors with `keep`.
    """

    def __init__(
        self, folder: Path, plan: Sequence[PlannedTensor], shard_bytes: int | None = None, begun: bool = False
    ) -> None:
        self.folder = folder
        self._begun = begun
        self._pending = {tensor.name: tensor for tensor in plan}
        self._place: dict[str, tuple[Path, int]] = {}
        self._unsynced: set[Path] = set()
        shards = _split(plan, shard_bytes or SHARD_BYTES)
        names = [SINGLE] if len(shards) == 1 else [
            f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
        ]  # fmt: skip
        self.total = sum(tensor.nbytes for tensor in plan)
        for name, shard in zip(names, shards, strict=True):
            self._start(folder / name, shard)
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": self.total},
                "weight_map": {t: place[0].name for t, place in sorted(self._place.items())},
            }
            write_json(folder / INDEX, index)

    def _start(self, path: Path, shard: Sequence[PlannedTensor]) -> None:
        head, offsets = _head(shard)
        size = len(head) + sum(tensor.nbytes for tensor in shard)
        if self._begun:
            _require_begun(path, head, size)
        else:
            with path.open("wb") as file:
                file.write(head)
                file.truncate(size)
        for name, offset in offsets.items():
            self._place[name] = (path, len(head) + offset)

    def keep(self, names: Iterable[str]) -> None:
        """Name the tensors that an earlier writer of the same files has written."""
        for name in names:
            del self._pending[name]

    def write(self, name: str, tensor: Tensor) -> None:
        """Put one planned tensor in its place. Its dtype and shape must be the planned ones."""
        if tuple(tensor.shape) != self._pending[name].shape:
            raise ValueError(f"{name}: planned {self._pending[name]}, got {tuple(tensor.shape)}")
        self.write_pieces(name, [tensor])

    def write_pieces(self, name: str, pieces: Iterable[Tensor]) -> None:
        """Put one planned tensor in its place, given as its rows in order, some at a time."""
        planned, written = self._pending.pop(name), 0
        path, offset = self._place[name]
        self._unsynced.add(path)
        with path.open("r+b") as file:
            file.seek(offset)
            for piece in pieces:
                written += piece.nbytes
                if piece.dtype != planned.dtype or written > planned.nbytes:
                    raise ValueError(f"{name}: planned {planned}, got {piece.dtype} and {written} bytes")
                file.write(raw_bytes(piece))
        if written != planned.nbytes:
            raise ValueError(f"{name}: planned {planned}, got {written} bytes")

    def finish(self) -> None:
        """Make sure that every planned tensor was written and is on the disk."""
        if self._pending:
            raise ValueError(f"never written: {sorted(self._pending)[:5]}")
        self.sync()

    def sync(self) -> None:
        """Make sure that everything written so far is on the disk."""
        while self._unsynced:
            with self._unsynced.pop().open("r+b") as file:
                os.fsync(file.fileno())


def files_bytes(plan: Sequence[PlannedTensor], shard_bytes: int | None = None) -> int:
    """Return the bytes of all safetensors files that a `TensorWriter` makes by a plan, their headers included."""
    shards = _split(plan, shard_bytes or SHARD_BYTES)
    return sum(len(_head(shard)[0]) + sum(tensor.nbytes for tensor in shard) for shard in shards)


def _head(shard: Sequence[PlannedTensor]) -> tuple[bytes, dict[str, int]]:
    """Return everything before the first tensor of a file, and where each tensor begins after that."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets, offset = {}, 0
    # tensors of odd sizes last: each then begins at a multiple of its elements' size, as readers that map it need
    for tensor in sorted(shard, key=lambda tensor: -min(ALIGNMENT, tensor.nbytes & -tensor.nbytes)):
        offsets[tensor.name], end = offset, offset + tensor.nbytes
        header[tensor.name] = {
            "dtype": FORMAT_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end],
        }  # fmt: skip
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % ALIGNMENT)
    return len(encoded).to_bytes(8, "little") + encoded, offsets


def _require_begun(path: Path, head: bytes, size: int) -> None:
    whole = path.is_file() and path.stat().st_size == size
    if whole:
        with path.open("rb") as file:
            whole = file.read(len(head)) == head
    if not whole:
        raise GemmaAwqError(f"{path} is missing or was changed since.", "Start over with --force.")


def _split(plan: Sequence[PlannedTensor], shard_bytes: int) -> list[list[PlannedTensor]]:
    shards: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in plan:
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file (see `json_bytes`) in a folder that is being built; elsewhere use `write_whole`."""
    path.write_bytes(json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """Readable JSON: indented by two spaces, with a newline at its end."""
    try:
        return f"{json.dumps(value, indent=2, ensure_ascii=False)}\n".encode()
    except UnicodeEncodeError:  # half a surrogate pair, as in a file name that is not UTF-8
        return f"{json.dumps(value, indent=2)}\n".encode()
