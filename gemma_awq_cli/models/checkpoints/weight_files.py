"""Tensors of safetensors files: mapped by name, checked to be finite, and as bytes."""

import errno
import mmap
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.files import REDOWNLOAD
from gemma_awq_cli.models.checkpoints.headers import TensorInfo, damage_errors
from gemma_awq_cli.system.arrays import DTYPES, Array, address, as_array, as_tensor

if TYPE_CHECKING:
    from torch import Tensor

_BOUND = re.compile(r"\.(input|output)_(min|max)$")
PIECE_BYTES = 64 * 2**20  # of a large tensor that is copied
_BLOCK = 2**18  # numbers that are checked at a time: they stay in the processor's cache
# Of each float's bits: as what integer they are read, those beside the sign, and those of infinity. NaNs are above it.
_INFINITY: dict[str, tuple[Any, int, int]] = {
    "float64": (np.uint64, 2**63 - 1, 0x7FF << 52), "float32": (np.uint32, 2**31 - 1, 0xFF << 23),
    "float16": (np.uint16, 2**15 - 1, 0x1F << 10), "bfloat16": (np.uint16, 2**15 - 1, 0xFF << 7),
}  # fmt: skip


def read_arrays(infos: Mapping[str, TensorInfo], names: Iterable[str]) -> dict[str, Array]:
    """The named tensors as they are stored, memory-mapped; the files are closed again at once.

    The mapping is private: what is written to an array never reaches the file.
    """
    by_file: dict[Path, list[str]] = {}
    for name in names:
        by_file.setdefault(infos[name].file, []).append(name)
    arrays = {}
    for file, wanted in by_file.items():
        memory = _mapped(file)
        for name in wanted:
            arrays[name] = _array(memory, infos[name])
    return arrays


def _mapped(file: Path) -> mmap.mmap:
    with damage_errors(file), file.open("rb") as stream:
        try:
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            if error.errno == errno.ENOMEM:
                raise MemoryError from None
            raise


def _array(memory: mmap.mmap, info: TensorInfo) -> Array:
    dtype = DTYPES[info.dtype_name]
    if info.start + info.nbytes > len(memory):
        raise GemmaAwqError(f"{info.file} has become shorter since its header was read.", REDOWNLOAD)
    array: Array = np.frombuffer(memory, np.uint8, info.nbytes, info.start)
    # compiled code needs a beginning at a multiple of the elements' size. A file that holds a tensor of an odd size,
    # such as one scalar in bfloat16, may begin others anywhere
    if info.start % dtype.itemsize:
        array = array.copy()
    return array.view(dtype).reshape(info.shape)


def release(array: Array) -> None:
    """Let the system take back the memory of a mapped array that was read; it is read again from the file if need be.

    Only where arrays are never written to: what was written would be lost.
    """
    owner: Any = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if isinstance(owner, memoryview):
        owner = owner.obj
    if not isinstance(owner, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED"):
        return
    start = address(array) - address(np.frombuffer(owner, np.uint8, 1))
    first, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, (start + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > first:
        owner.madvise(mmap.MADV_DONTNEED, first, end - first)


def read_tensors(infos: Mapping[str, TensorInfo], names: Iterable[str]) -> "dict[str, Tensor]":
    """The same as torch's tensors."""
    return {name: as_tensor(array) for name, array in read_arrays(infos, names).items()}


def read_array_pieces(name: str, info: TensorInfo) -> Iterator[Array]:
    """Yield a tensor's rows in order, as many at a time as `PIECE_BYTES` hold, each piece checked to be finite.

    Only one piece is in memory at a time, if the receiver keeps none: the file is mapped anew for each.
    """
    rows = info.shape[0] if info.shape else 1
    step = max(1, PIECE_BYTES * rows // max(1, info.nbytes))
    for first in range(0, max(1, rows), step):
        whole = read_arrays({name: info}, [name])[name]
        piece = whole if rows <= step else whole[first : first + step]
        require_finite_array(name, piece)
        yield piece
        del whole, piece


def read_pieces(name: str, info: TensorInfo) -> "Iterator[Tensor]":
    """The same as torch's tensors."""
    return map(as_tensor, read_array_pieces(name, info))


def raw_bytes(tensor: "Tensor") -> memoryview:
    """A tensor's bytes, as a safetensors file holds them."""
    return array_bytes(as_array(tensor.contiguous()))


def array_bytes(array: Array) -> memoryview:
    """A contiguous array's bytes, as a safetensors file holds them. They share its memory."""
    return array.reshape(-1).view(np.uint8).data


def require_finite(name: str, tensor: "Tensor") -> None:
    """An error if a weight holds NaN or infinity. A bound of activations may be infinite: it clips nothing then."""
    require_finite_array(name, as_array(tensor.contiguous()))


def require_finite_mapped(name: str, array: Array) -> None:
    """The same of an array that `read_arrays` has just mapped; little of it is left in memory."""
    rows = max(1, PIECE_BYTES * len(array) // max(1, array.nbytes)) if array.ndim else 1
    for first in range(0, len(array) if array.ndim else 1, rows):
        piece = array[first : first + rows] if array.ndim else array
        require_finite_array(name, piece)
        release(piece)


def require_finite_array(name: str, array: Array) -> None:
    """The same of a contiguous array."""
    if array.dtype.name not in _INFINITY:
        return
    kind, magnitude, infinity = _INFINITY[array.dtype.name]
    bits = array.reshape(-1).view(kind)
    most = infinity if _BOUND.search(name) else infinity - 1
    part = np.empty(min(_BLOCK, len(bits)), kind)
    for first in range(0, len(bits), _BLOCK):
        block = bits[first : first + _BLOCK]
        if np.bitwise_and(block, kind(magnitude), out=part[: len(block)]).max() > most:
            raise GemmaAwqError(
                f"{name} holds NaN or infinite values.",
                "The checkpoint is damaged or its training diverged. " + REDOWNLOAD,
            )
