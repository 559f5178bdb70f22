"""The safetensors files of a folder: which of them make up the model, what their headers say, and tensors from them.

A folder can hold more than one set of weights, such as the shards and the index of an earlier save beside a new whole
file. The one complete set is read; two complete ones are an error, because nothing tells which of them is meant.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gemma_awq_cli.errors import GemmaAwqError, some
from gemma_awq_cli.models.checkpoints.files import INDEX, REDOWNLOAD, SINGLE, read_json, require_inside
from gemma_awq_cli.models.checkpoints.foreign import explain_no_weights
from gemma_awq_cli.system.failures import first_line, reason_of
from gemma_awq_cli.system.reading import require_regular

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMED = 3  # of many names, so many are shown


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is, from the file's header alone."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class WeightFiles:
    """The files of one set. index: what an index says of the tensors' places, name -> file name; notes: what is not
    read, a line each.
    """

    folder: Path
    files: tuple[Path, ...]
    index: Mapping[str, str]
    notes: tuple[str, ...] = ()


def few(names: Iterable[str]) -> str:
    """As `some`, of names as long as tensors have."""
    return some(names, NAMED)


def find_weights(folder: Path) -> WeightFiles:
    """The one complete set of a folder: `model.safetensors`, or what an index names. Nothing is opened but the index.

    Two complete sets are an error, and so is none.
    """
    single, index = folder / SINGLE, folder / INDEX
    whole = single.exists()
    if not index.exists():
        if not whole:
            raise explain_no_weights(folder)
        return WeightFiles(folder, (single,), {}, _left(folder, {SINGLE}))
    require_inside(folder, index)
    try:
        weight_map = _weight_map(index)
    except GemmaAwqError as error:
        if not whole:
            raise
        # transformers would not open the index here either
        return WeightFiles(folder, (single,), {}, (f"{INDEX} is not used: {error.message}", *_left(folder, {SINGLE})))
    names = sorted(set(weight_map.values()))
    for name in names:
        _require_plain(index, name)
    missing = [name for name in names if not (folder / name).exists()]
    if missing and (not whole or SINGLE in names):
        raise GemmaAwqError(f"{index} names files that are missing: {few(missing)}.", REDOWNLOAD)
    if missing:
        stale = f"{INDEX} is not used: files that it names are missing ({few(missing)}), and {SINGLE} is there."
        return WeightFiles(folder, (single,), {}, (stale, *_left(folder, {SINGLE, *names})))
    if whole and SINGLE not in names:
        raise GemmaAwqError(
            f"{folder} holds two sets of weights: {SINGLE}, and what {INDEX} names ({few(names)}).",
            f"Keep the one that is the model: move {SINGLE} out of the folder, or {INDEX} and its files.",
        )
    return WeightFiles(folder, tuple(folder / name for name in names), weight_map, _left(folder, {*names}))


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, as an index says."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise GemmaAwqError(f"{index} has no weight_map.", REDOWNLOAD)
    if odd := [name for name in weight_map.values() if not isinstance(name, str)]:
        raise GemmaAwqError(f"{index} names {odd[0]!s:.50} as a file.", REDOWNLOAD)
    return weight_map


def _require_plain(index: Path, name: str) -> None:
    # by the rules of both systems: `..\\x` is a plain name here, and leads elsewhere on Windows
    plain = name == PurePosixPath(name).name == PureWindowsPath(name).name and name.isprintable()
    if not plain or not name.endswith(".safetensors"):
        raise GemmaAwqError(
            f"{index} names {name[:100]!r}, which is not the plain name of a safetensors file.",
            "An index names files of its own folder only. Correct its weight_map, or get the checkpoint elsewhere.",
        )


def _left(folder: Path, read: set[str]) -> tuple[str, ...]:
    """A note on safetensors files that are in the folder and not in the set."""
    left = sorted({path.name for path in folder.glob("*.safetensors")} - read)
    return (f"Not read: {few(left)}, which {'are' if len(left) > 1 else 'is'} not part of the model.",) if left else ()


def read_headers(weights: WeightFiles) -> dict[str, TensorInfo]:
    """Every tensor of a set by its name, from the files' headers."""
    tensors: dict[str, TensorInfo] = {}
    for file in weights.files:
        require_inside(weights.folder, file)
        found = _read_header(file)
        if twice := sorted(found.keys() & tensors.keys()):
            other = tensors[twice[0]].file.name
            raise GemmaAwqError(f"{few(twice)}: both in {other} and in {file.name}.", REDOWNLOAD)
        tensors |= found
    if absent := sorted(weights.index.keys() - tensors.keys()):
        raise GemmaAwqError(f"{weights.folder / INDEX} names tensors that no file holds: {few(absent)}.", REDOWNLOAD)
    return tensors


def _read_header(file: Path) -> dict[str, TensorInfo]:
    infos = {}
    with _opened(file) as handle:
        for name in handle.keys():  # noqa: SIM118 (a safe_open handle is no mapping)
            view = handle.get_slice(name)
            dtype = DTYPES.get(view.get_dtype())
            if dtype is None:
                raise GemmaAwqError(
                    f"{file.name}: {name} has dtype {view.get_dtype()}, which is not a plain 16- or 32-bit weight.",
                    "Give the original 16-bit checkpoint.",
                )
            infos[name] = TensorInfo(file, tuple(view.get_shape()), dtype)
    return infos


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    require_regular(file, REDOWNLOAD)
    try:
        with safe_open(file, "pt") as handle:
            yield handle
    except SafetensorError as error:
        raise GemmaAwqError(f"{file} is damaged or truncated: {first_line(error)}.", REDOWNLOAD) from None
    except OSError as error:
        raise GemmaAwqError(f"{file} cannot be read: {reason_of(error)}.", REDOWNLOAD) from None
    except MemoryError:  # of the library, which maps the file
        raise GemmaAwqError(
            f"{file} has {file.stat().st_size} bytes, more than this process may map.",
            "Raise the limit of its address space (ulimit -v), or compare the file's size with the source's.",
        ) from None


def read_tensors(infos: Mapping[str, TensorInfo], names: Iterable[str]) -> dict[str, Tensor]:
    """The named tensors, memory-mapped as they are stored. The files are closed again at once."""
    by_file: dict[Path, list[str]] = {}
    for name in names:
        by_file.setdefault(infos[name].file, []).append(name)
    tensors = {}
    for file, wanted in by_file.items():
        with _opened(file) as handle:
            for name in wanted:
                tensors[name] = handle.get_tensor(name)
    return tensors


def raw_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes as a safetensors file holds them."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def require_finite(name: str, tensor: Tensor) -> None:
    """An error if a weight holds NaN or infinity."""
    # the extremes are one pass without a copy, and a NaN is both of them
    if not tensor.is_floating_point() or not tensor.numel():
        return
    if not all(torch.isfinite(extreme) for extreme in torch.aminmax(tensor)):
        raise GemmaAwqError(
            f"{name} holds NaN or infinite values.",
            "The checkpoint is damaged or its training diverged. " + REDOWNLOAD,
        )
