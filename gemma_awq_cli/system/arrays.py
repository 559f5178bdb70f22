"""Weights and logits as numpy arrays, and the torch tensors that share their memory. Imports no torch by itself."""

import sys
from math import prod
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[Any]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# numpy's dtypes by torch's names; those that numpy lacks come from ml_dtypes
DTYPES: dict[str, np.dtype[Any]] = {
    "bfloat16": BFLOAT16,
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    **{
        name: np.dtype(name)
        for name in (
            "float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool", "uint16", "uint32",
            "uint64",
        )
    },
}  # fmt: skip
_FOREIGN = ("bfloat16", "float8_e4m3fn", "float8_e5m2")  # what torch.from_numpy does not take


def as_tensor(array: Array) -> "torch.Tensor":
    """The tensor of an array's memory. array: writable, as arrays mapped from files are."""
    import torch

    name = array.dtype.name
    if name not in _FOREIGN:
        return torch.from_numpy(array)
    dtype: torch.dtype = getattr(torch, name)
    return torch.from_numpy(array.view(np.int16 if array.itemsize == 2 else np.uint8)).view(dtype)


def as_array(tensor: "torch.Tensor") -> Array:
    """The array of a tensor's memory; of a copy of it if it is on another device than the CPU."""
    import torch

    tensor = tensor.detach().cpu()
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in _FOREIGN:
        found: Array = tensor.numpy()
        return found
    words: Array = tensor.view(torch.int16 if tensor.itemsize == 2 else torch.uint8).numpy()
    return words.view(DTYPES[name])


def address(array: Array) -> int:
    """Where a contiguous array begins in memory."""
    assert array.flags.c_contiguous
    found: int = array.__array_interface__["data"][0]
    return found


class ReusedMemory:
    """Float32 arrays one after another in the same memory, for as long as nobody holds the last one.

    Large arrays of changing sizes that come and go for hours, with small ones made between, leave holes in the heap.
    Larger ones than `most` numbers are made anew.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._replace(0)

    def array(self, *shape: int) -> npt.NDArray[np.float32]:
        """Return an array of the shape, whose values mean nothing. It stays as it is while it or a view of it lives."""
        size = prod(shape)
        if size > self._most:
            return np.empty(shape, np.float32)
        # whatever shows the memory, a view of a view too, refers to the whole of it
        if self._memory.size < size or sys.getrefcount(self._memory) != self._unheld:
            self._replace(size)
        return self._memory[:size].reshape(shape)

    def _replace(self, size: int) -> None:
        self._memory = np.empty(size, np.float32)
        self._unheld = sys.getrefcount(self._memory)
