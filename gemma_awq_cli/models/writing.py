"""Writing a model folder so that nothing half-written ever looks whole.

A folder is built beside its final place under a name that no reader takes for a model and renamed when it is complete.
The safetensors files are planned first (names, dtypes, shapes), so that each tensor goes to its final place in its
file as soon as it is known, in any order, and none has to stay in memory.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoint import DTYPES, INDEX, SINGLE

REPORT = "quantization_report.json"
SHARD_BYTES = 4 * 10**9
FORMAT_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class PlannedTensor:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


ELSEWHERE = "choose another folder with -o"


@contextmanager
def write_errors(folder: Path, elsewhere: str = ELSEWHERE) -> Iterator[None]:
    """Turn the operating system's refusals while writing below `folder` into clear errors.

    elsewhere: what the user can do to have it written somewhere else.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message, hint = f"The disk of {folder} is full.", f"Free some space, or {elsewhere}."
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            message, hint = f"{folder} cannot be written: {error.strerror}.", f"Change its permissions, or {elsewhere}."
        elif error.errno in (errno.ENOTDIR, errno.EEXIST, errno.ENOENT):
            message, hint = f"{folder} cannot be a folder: {error.strerror}.", f"Check the path, or {elsewhere}."
        else:
            raise
        raise GemmaAwqError(message, hint) from error


class StagedFolder:
    """A folder that appears at `target` complete, or not at all.

    An existing non-empty `target` is refused unless `force`, and then only replaced if it holds a model that this tool
    wrote; it stays in place until its successor is complete.
    """

    def __init__(self, target: Path, force: bool = False, elsewhere: str = ELSEWHERE) -> None:
        self.target = target
        self.elsewhere = elsewhere
        self.path = target.parent / f".{target.name}.partial"
        if target.exists() and not target.is_dir():
            raise GemmaAwqError(f"{target} exists and is not a folder.", "Choose another folder with -o.")
        if target.is_dir() and any(target.iterdir()):
            if not force:
                raise GemmaAwqError(
                    f"{target} exists and is not empty.", "Choose another folder with -o, or replace it with --force."
                )
            if not (target / REPORT).is_file():
                raise GemmaAwqError(
                    f"{target} is not an artifact of this tool (it has no {REPORT}), so --force does not replace it.",
                    "Choose another folder with -o, or empty it yourself.",
                )

    def __enter__(self) -> Path:
        with write_errors(self.target, self.elsewhere):
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(parents=True)
        return self.path

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            return
        with write_errors(self.target, self.elsewhere):
            replaced = self.target.parent / f".{self.target.name}.replaced"
            if self.target.exists():
                shutil.rmtree(replaced, ignore_errors=True)
                self.target.rename(replaced)
            self.path.rename(self.target)
            shutil.rmtree(replaced, ignore_errors=True)


def require_space(folder: Path, needed: int, elsewhere: str = ELSEWHERE) -> None:
    """An error before anything is computed if `needed` bytes do not fit on the disk that will hold `folder`."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise GemmaAwqError(
            f"{folder} needs {needed / 1e9:.2f} GB, but its disk has {free / 1e9:.2f} GB free.",
            f"Free some space, or {elsewhere}.",
        )


class TensorWriter:
    """The safetensors files of one folder, written tensor by tensor in any order."""

    def __init__(self, folder: Path, plan: Sequence[PlannedTensor], shard_bytes: int = SHARD_BYTES) -> None:
        self.folder = folder
        self._pending = {tensor.name: tensor for tensor in plan}
        self._place: dict[str, tuple[Path, int]] = {}
        shards = _split(plan, shard_bytes)
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
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for tensor in shard:
            end = offset + tensor.nbytes
            header[tensor.name] = {
                "dtype": FORMAT_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end],
            }  # fmt: skip
            offset = end
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        with path.open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little"))
            file.write(encoded)
            file.truncate(8 + len(encoded) + offset)
        for tensor in shard:
            start = header[tensor.name]["data_offsets"][0]
            self._place[tensor.name] = (path, 8 + len(encoded) + start)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put one planned tensor in its place. Its dtype and shape must be the planned ones."""
        planned = self._pending.pop(name)
        if tensor.dtype != planned.dtype or tuple(tensor.shape) != planned.shape:
            raise ValueError(f"{name}: planned {planned}, got {tensor.dtype} {tuple(tensor.shape)}")
        path, offset = self._place[name]
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(data.data)

    def finish(self) -> None:
        """Make sure that every planned tensor was written and is on the disk."""
        if self._pending:
            raise ValueError(f"never written: {sorted(self._pending)[:5]}")
        for path in {place[0] for place in self._place.values()}:
            with path.open("r+b") as file:
                os.fsync(file.fileno())


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
    """A readable JSON file: two spaces, a newline at its end."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
