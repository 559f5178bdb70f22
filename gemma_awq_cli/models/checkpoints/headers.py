"""The safetensors files of a folder: which of them make up the model, and what their headers say. Without torch.

A folder can hold more than one set of weights, such as the shards and the index of an earlier save beside a new whole
file. The one complete set is read; two complete ones are an error, because nothing tells which of them is meant.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, BinaryIO

from safetensors import SafetensorError, safe_open

from gemma_awq_cli.errors import GemmaAwqError, some
from gemma_awq_cli.models.checkpoints.files import INDEX, REDOWNLOAD, SINGLE, read_json, require_inside
from gemma_awq_cli.models.checkpoints.foreign import explain_no_weights
from gemma_awq_cli.system.failures import first_line, reason_of
from gemma_awq_cli.system.json_input import parse_json_object
from gemma_awq_cli.system.reading import require_regular

if TYPE_CHECKING:
    import torch

# The dtypes that are read: safetensors' name -> torch's name, and bytes per element.
DTYPES = {
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2),
    "I64": ("int64", 8), "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1), "U8": ("uint8", 1),
    "BOOL": ("bool", 1), "U16": ("uint16", 2), "U32": ("uint32", 4), "U64": ("uint64", 8),
    "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1),
}  # fmt: skip
METADATA = "__metadata__"  # an entry of a header that is no tensor
HEADER_BYTES = 100_000_000  # the limit of the format
FIRST_BYTES = 128 * 1024  # of a file that is not here, which hold most headers
NAMED = 3  # how many of many names are shown


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is, from the file's header alone.

    stored: its dtype's name in `DTYPES`; start: of its bytes in the file, 0 of a file that has not been fetched.
    """

    file: Path
    shape: tuple[int, ...]
    stored: str
    start: int = 0

    @property
    def dtype(self) -> "torch.dtype":
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype_name)
        return dtype

    @property
    def dtype_name(self) -> str:
        """torch's name of its dtype, such as `bfloat16`."""
        return DTYPES[self.stored][0]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.stored][1]


@dataclass(frozen=True)
class WeightFiles:
    """The files of one set of weights.

    index: tensor name -> file name, as an index has it; notes: a line on each thing in the folder that is not read.
    """

    folder: Path
    files: tuple[Path, ...]
    index: Mapping[str, str]
    notes: tuple[str, ...] = ()


def few(names: Iterable[str]) -> str:
    """The first names of many, for messages; `some` with a limit that suits the long names of tensors."""
    return some(names, NAMED)


def find_weights(folder: Path, elsewhere: Collection[str] = ()) -> WeightFiles:
    """The one complete set of a folder: `model.safetensors`, or the files that an index names. Opens only the index.

    elsewhere: names of files that count as the folder's own although they have not been fetched. An error if there are
    two complete sets or none.
    """
    single, index = folder / SINGLE, folder / INDEX

    def is_there(name: str) -> bool:
        return name in elsewhere or (folder / name).exists()

    whole = is_there(SINGLE)
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
    missing = [name for name in names if not is_there(name)]
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
    """An index's map from tensor names to file names."""
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
    """A note on safetensors files that are in the folder but not in the set."""
    left = sorted({path.name for path in folder.glob("*.safetensors")} - read)
    return (f"Not read: {few(left)}, which {'are' if len(left) > 1 else 'is'} not part of the model.",) if left else ()


def read_headers(weights: WeightFiles) -> dict[str, TensorInfo]:
    """Every tensor of a set by its name, from the files' headers."""
    for file in weights.files:
        require_inside(weights.folder, file)
    return merge_headers(weights, read_file_header)


def merge_headers(weights: WeightFiles, read: Callable[[Path], dict[str, TensorInfo]]) -> dict[str, TensorInfo]:
    """Every tensor of a set by its name, from what `read` returns for each of its files."""
    tensors: dict[str, TensorInfo] = {}
    for file in weights.files:
        found = read(file)
        if twice := sorted(found.keys() & tensors.keys()):
            other = tensors[twice[0]].file.name
            raise GemmaAwqError(f"{few(twice)}: stored both in {other} and in {file.name}.", REDOWNLOAD)
        tensors |= found
    if absent := sorted(weights.index.keys() - tensors.keys()):
        raise GemmaAwqError(f"{weights.folder / INDEX} names tensors that no file holds: {few(absent)}.", REDOWNLOAD)
    return tensors


def read_file_header(file: Path) -> dict[str, TensorInfo]:
    """Every tensor of one file by its name."""
    header, first = _local_header(file)
    return {name: _local_info(file, name, entry, first) for name, entry in header.items() if name != METADATA}


def read_file_metadata(file: Path) -> dict[str, str]:
    """What one file says of itself: texts by their names."""
    stated = _local_header(file)[0].get(METADATA, {})
    return {name: value for name, value in stated.items() if isinstance(value, str)}


def _local_header(file: Path) -> tuple[dict[str, Any], int]:
    """The header of a file that the library finds sound, and where its data begin."""
    with damage_errors(file):
        with safe_open(file, "numpy"):
            pass  # the library has checked that the tensors fill the file and that none of them overlap
        with file.open("rb") as stream:
            return read_header(file.name, file.stat().st_size, partial(_read_at, stream), FIRST_BYTES)


def _read_at(stream: BinaryIO, start: int, count: int) -> bytes:
    stream.seek(start)
    return stream.read(count)


def _local_info(file: Path, name: str, entry: object, first: int) -> TensorInfo:
    """What a header says of a tensor of a file whose data begin at `first`."""
    info = header_entry(file, name, entry)
    start, end = entry["data_offsets"]  # type: ignore[index]  # checked by the library
    if end - start != info.nbytes:
        raise GemmaAwqError(f"{file.name}: {name} has {end - start} bytes, its shape {info.nbytes}.", REDOWNLOAD)
    return replace(info, start=first + start)


def header_entry(file: Path, name: str, entry: object) -> TensorInfo:
    """What an entry of a header says of a tensor. An error if it makes no sense or its dtype is none that is read."""
    shape, dtype = (entry.get("shape"), entry.get("dtype")) if isinstance(entry, dict) else (None, None)
    if not isinstance(dtype, str) or not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise GemmaAwqError(f"{file.name}: the header's entry of {name} makes no sense.", REDOWNLOAD)
    if dtype not in DTYPES:
        raise GemmaAwqError(
            f"{file.name}: {name} has dtype {dtype}, which is not a plain 16- or 32-bit weight.",
            "Give the original 16-bit checkpoint.",
        )
    return TensorInfo(file, tuple(shape), dtype)


def read_header(name: str, size: int, read: Callable[[int, int], bytes], first: int) -> tuple[dict[str, Any], int]:
    """Return the JSON header of a file that may be elsewhere, and where its data begin.

    size: of the file in bytes; read: (first byte, count) -> at most that many bytes; first: how many are read before
    the header's length is known.
    """
    head = read(0, first)
    length = int.from_bytes(head[:8], "little")
    if len(head) < 8 or length > min(size - 8, HEADER_BYTES):
        what = "empty" if not size else f"no safetensors file, or cut off ({size} bytes)"
        raise GemmaAwqError(f"{name} is {what}.", REDOWNLOAD)
    text = head[8 : 8 + length]
    if len(text) < length:
        text += read(8 + len(text), length - len(text))
    try:
        return parse_json_object(text.decode(), f"The header of {name}", REDOWNLOAD), 8 + length
    except UnicodeDecodeError:
        raise GemmaAwqError(f"The header of {name} is not UTF-8.", REDOWNLOAD) from None


@contextmanager
def damage_errors(file: Path) -> Iterator[None]:
    """A clear error if a safetensors file is damaged, cannot be read or cannot be mapped."""
    require_regular(file, REDOWNLOAD)
    try:
        yield
    except SafetensorError as error:
        raise GemmaAwqError(f"{file} is damaged or truncated: {first_line(error)}.", REDOWNLOAD) from None
    except OSError as error:
        raise GemmaAwqError(f"{file} cannot be read: {reason_of(error)}.", REDOWNLOAD) from None
    except MemoryError:  # raised by the library, which maps the file too
        raise GemmaAwqError(
            f"{file} has {file.stat().st_size} bytes, more than this process may map.",
            "Raise the limit of its address space (ulimit -v), or compare the file's size with the source's.",
        ) from None
