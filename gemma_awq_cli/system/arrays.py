"""Weights and logits as numpy arrays, and the torch tensors that share their memory. Imports no torch by itself."""

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
