"""What the compiled library takes, in ctypes: the structures of linear.h and engine.cpp, field by field.

ctypes by itself cuts off what a field or an argument does not hold. Here each number arrives whole or is an
OverflowError, whatever let it come so far.
"""

import ctypes
import math
from collections.abc import Iterable
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from functools import cache
from typing import Any

MAX_PARTS = 3


class _Checked(ctypes.Structure):
    """A structure whose fields hold exactly the integers that were set, and finite numbers."""

    def __setattr__(self, name: str, value: Any) -> None:
        kind = _kinds(type(self))[name]
        super().__setattr__(name, value)
        held = getattr(self, name)
        if kind is c_float:
            if not math.isfinite(held):
                raise OverflowError(f"{name} is {value}")
        elif isinstance(value, int) and (held or 0) != value:  # a null pointer reads as None
            raise OverflowError(f"{name} cannot hold {value}")


@cache
def _kinds(structure: type[ctypes.Structure]) -> dict[str, Any]:
    return {field[0]: field[1] for field in structure._fields_}


class Int32(c_int32):
    """An argument of 32 bits."""

    @classmethod
    def from_param(cls, value: Any) -> c_int32:  # type: ignore[override]
        return c_int32(_within(value, 32))


class Int64(c_int64):
    """An argument of 64 bits."""

    @classmethod
    def from_param(cls, value: Any) -> c_int64:  # type: ignore[override]
        return c_int64(_within(value, 64))


def int64s(values: Iterable[int]) -> Any:
    """An array of 64-bit integers."""
    checked = [_within(value, 64) for value in values]
    return (c_int64 * len(checked))(*checked)


def _within(value: int, bits: int) -> int:
    if not -(2 ** (bits - 1)) <= value < 2 ** (bits - 1):
        raise OverflowError(f"{value} does not fit {bits} bits")
    return value


class LinearSpec(_Checked):
    _fields_ = [
        ("kind", c_int32), ("group", c_int64), ("inputs", c_int64), ("outputs", c_int64),
        ("data", c_void_p), ("zeros", c_void_p),
        ("parts", c_void_p * MAX_PARTS), ("part_rows", c_int64 * MAX_PARTS),
    ]  # fmt: skip


class LayerSpec(_Checked):
    _fields_ = [
        ("qkv", LinearSpec), ("o", LinearSpec), ("gate_up", LinearSpec), ("down", LinearSpec),
        ("input_norm", c_void_p), ("attention_norm", c_void_p), ("mlp_norm", c_void_p), ("post_mlp_norm", c_void_p),
        ("q_norm", c_void_p), ("k_norm", c_void_p), ("inv_freq", c_void_p),
        ("rope_factor", c_float), ("window", c_int64),
    ]  # fmt: skip


class ModelSpec(_Checked):
    _fields_ = [
        ("hidden", c_int64), ("intermediate", c_int64), ("heads", c_int64), ("kv_heads", c_int64),
        ("head_dim", c_int64), ("layers", c_int64),
        ("eps", c_float), ("embed_scale", c_float), ("query_scale", c_float),
        ("attention_softcap", c_float), ("final_softcap", c_float),
        ("embedding", c_void_p), ("norm", c_void_p), ("head", LinearSpec), ("layer", POINTER(LayerSpec)),
        ("exact", c_void_p),
    ]  # fmt: skip


class CacheSpec(_Checked):
    _fields_ = [("keys", POINTER(c_void_p)), ("values", POINTER(c_void_p)), ("slots", POINTER(c_int64))]


class PieceSpec(_Checked):
    _fields_ = [("row", c_int64), ("start", c_int64), ("count", c_int64), ("offset", c_int64)]


ARGUMENTS = {
    "gaq_forward": (
        POINTER(ModelSpec), POINTER(CacheSpec), POINTER(PieceSpec), Int64, c_void_p, Int64, POINTER(c_int64),
        c_void_p, Int32,
    ),
    "gaq_large_pages": (c_void_p, Int64),
    "gaq_linear": (POINTER(LinearSpec), c_void_p, Int64, c_void_p, Int32),
    "gaq_pack_awq": (c_void_p, c_void_p, c_void_p, Int64, Int64, Int64, c_void_p, c_void_p, Int32),
    "gaq_quantize": (Int32, c_void_p, Int64, Int64, Int64, c_void_p, c_void_p, Int32),
}  # fmt: skip
