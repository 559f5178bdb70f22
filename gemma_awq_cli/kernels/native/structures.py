"""The structures that the compiled library takes, in ctypes: those of linear.h and specs.h, field by field.

ctypes by itself truncates a number that a field or an argument cannot hold. Here each number arrives whole or raises
OverflowError, wherever it came from. `layout_mismatch` compares the fields with what a library says of its own.
"""

import ctypes
import math
from collections.abc import Iterable
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from functools import cache
from typing import Any

INT4, INT8, BF16, INT4_BY_INPUT = 0, 1, 2, 3  # a linear's kind
BLOCK = 32  # outputs per block of an integer linear
PADDED = 128  # what the outputs of INT4_BY_INPUT are a multiple of
MAX_PARTS = 3  # weights that a bf16 linear joins
MAX_HEAD_DIM = 512
MAX_STREAMS = 8  # of AltUp
HELD_GROUP = 32  # numbers of a key or a value in 8 bits that share a scale


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
    """A 32-bit argument."""

    @classmethod
    def from_param(cls, value: Any) -> c_int32:  # type: ignore[override]
        return c_int32(_within(value, 32))


class Int64(c_int64):
    """A 64-bit argument."""

    @classmethod
    def from_param(cls, value: Any) -> c_int64:  # type: ignore[override]
        return c_int64(_within(value, 64))


def int64s(values: Iterable[int]) -> Any:
    """An array of 64-bit integers."""
    checked = [_within(value, 64) for value in values]
    return (c_int64 * len(checked))(*checked)


def _within(value: int, bits: int) -> int:
    if not -(2 ** (bits - 1)) <= value < 2 ** (bits - 1):
        raise OverflowError(f"{value} does not fit into {bits} bits")
    return value


class LinearSpec(_Checked):
    """One linear: kind is INT4, INT8, BF16 or INT4_BY_INPUT; group is 0 for BF16.

    activation_group: inputs of a row that share a scale; it divides the group.
    """

    _fields_ = [
        ("kind", c_int32), ("group", c_int64), ("activation_group", c_int64), ("inputs", c_int64), ("outputs", c_int64),
        ("data", c_void_p), ("zeros", c_void_p),
        ("parts", c_void_p * MAX_PARTS), ("part_rows", c_int64 * MAX_PARTS),
    ]  # fmt: skip


class ExpertsSpec(_Checked):
    """The experts of a layer; see specs.h for what the fields of these structures mean."""

    _fields_ = [
        ("count", c_int64), ("active", c_int64), ("intermediate", c_int64),
        ("router", LinearSpec), ("router_gain", c_void_p), ("scale", c_void_p), ("norm", c_void_p),
        ("post_norm", c_void_p), ("dense_norm", c_void_p),
        ("gate_up", POINTER(LinearSpec)), ("down", POINTER(LinearSpec)),
    ]  # fmt: skip


class AltUpSpec(_Checked):
    """What a layer of a model with several streams has."""

    _fields_ = [
        ("router", c_void_p), ("router_gain", c_void_p), ("prediction", c_void_p), ("correction", c_void_p),
        ("output_scale", c_void_p), ("laurel_left", LinearSpec), ("laurel_right", LinearSpec),
        ("laurel_norm", c_void_p),
    ]  # fmt: skip


class LayerSpec(_Checked):
    """One decoder layer."""

    _fields_ = [
        ("heads", c_int64), ("kv_heads", c_int64), ("head_dim", c_int64), ("intermediate", c_int64),
        ("window", c_int64), ("kv_buffer", c_int64),
        ("reads_kv", c_int32), ("keys_are_values", c_int32), ("value_norm", c_int32), ("sparse_gate", c_int32),
        ("gate_cut", c_float), ("scalar", c_float),
        ("qkv", LinearSpec), ("o", LinearSpec), ("gate_up", LinearSpec), ("down", LinearSpec),
        ("per_layer_gate", LinearSpec), ("per_layer_projection", LinearSpec),
        ("input_norm", c_void_p), ("attention_norm", c_void_p), ("mlp_norm", c_void_p), ("post_mlp_norm", c_void_p),
        ("q_norm", c_void_p), ("k_norm", c_void_p), ("per_layer_norm", c_void_p), ("inv_freq", c_void_p),
        ("rope_factor", c_float), ("query_scale", c_float),
        ("experts", POINTER(ExpertsSpec)), ("altup", POINTER(AltUpSpec)),
    ]  # fmt: skip


class ModelSpec(_Checked):
    """A language model: what its layers have in common, the embedding and the head."""

    _fields_ = [
        ("hidden", c_int64), ("layers", c_int64), ("kv_buffers", c_int64), ("first_kv_reader", c_int64),
        ("eps", c_float), ("embed_scale", c_float), ("attention_softcap", c_float), ("final_softcap", c_float),
        ("embedding", c_void_p), ("norm", c_void_p), ("head", LinearSpec), ("layer", POINTER(LayerSpec)),
        ("exact", c_void_p),
        ("per_layer_width", c_int64), ("per_layer_rows", c_int64), ("per_layer_table", c_void_p),
        ("per_layer_projection", LinearSpec), ("per_layer_gain", c_void_p),
        ("streams", c_int64), ("active_stream", c_int64),
        ("stream_starts", POINTER(LinearSpec)), ("stream_ends", POINTER(LinearSpec)),
    ]  # fmt: skip


class CacheSpec(_Checked):
    """A KV cache: a pointer per layer, how many slots it has, and how they are held (BF16 or INT8)."""

    _fields_ = [
        ("keys", POINTER(c_void_p)), ("values", POINTER(c_void_p)), ("slots", POINTER(c_int64)), ("kind", c_int32),
    ]  # fmt: skip


class ChunkSpec(_Checked):
    """A `RowChunk`, and where its tokens begin in the flat batch."""

    _fields_ = [("row", c_int64), ("start", c_int64), ("count", c_int64), ("offset", c_int64)]


ARGUMENTS = {
    "gaq_add_cross": (c_void_p, Int64, c_void_p, Int64, Int64, Int64, c_void_p, c_void_p, Int32, Int32),
    "gaq_add_gram": (c_void_p, Int32, Int64, Int64, Int64, c_void_p, c_void_p, c_void_p, Int32, Int32),
    "gaq_add_stretch": (c_void_p, Int64, c_void_p, c_float, Int64, Int64, Int64, c_void_p, c_void_p, Int32),
    "gaq_attend": (
        c_void_p, POINTER(c_int64), c_void_p, POINTER(c_int64), c_void_p, POINTER(c_int64), Int64, Int64, Int64, Int64,
        Int64, Int64, c_float, c_void_p, Int32, Int32,
    ),
    "gaq_forward": (
        POINTER(ModelSpec), POINTER(CacheSpec), POINTER(ChunkSpec), Int64, c_void_p, Int64, POINTER(c_int64),
        c_void_p, Int32,
    ),
    "gaq_gelu": (c_void_p, Int32, Int64, c_void_p, Int32),
    "gaq_large_pages": (c_void_p, Int64),
    "gaq_leading": (c_void_p, Int64, Int64, Int64, c_void_p, c_void_p, Int32),
    "gaq_linear": (POINTER(LinearSpec), c_void_p, Int64, c_void_p, Int32),
    "gaq_move_columns": (*[c_void_p] * 8, Int64, Int64, Int32),
    "gaq_multiply": (
        c_void_p, Int64, Int64, Int64, Int64, c_void_p, Int64, Int64, Int64, c_void_p, Int32, Int32,
    ),
    "gaq_norm": (c_void_p, Int32, Int64, Int64, c_void_p, c_float, c_void_p, Int32),
    "gaq_pack_awq": (Int32, c_void_p, c_void_p, c_void_p, Int64, Int64, Int64, c_void_p, c_void_p, Int32),
    "gaq_quantize": (Int32, c_void_p, Int64, Int64, Int64, c_void_p, c_void_p, Int32),
    "gaq_rotate": (
        c_void_p, Int32, POINTER(c_int64), *[Int64] * 4, c_void_p, c_void_p, Int64, c_void_p, Int32,
    ),
    "gaq_round_columns": (*[c_void_p] * 7, Int64, Int64, Int32),
    "gaq_split": (c_void_p, Int64, Int64, Int64, Int64, Int64, c_void_p, Int32),
}  # fmt: skip

STRUCTURES = (LinearSpec, ExpertsSpec, AltUpSpec, LayerSpec, ModelSpec, CacheSpec, ChunkSpec)
CONSTANTS = (
    "INT4",
    "INT8",
    "BF16",
    "INT4_BY_INPUT",
    "BLOCK",
    "PADDED",
    "MAX_PARTS",
    "MAX_HEAD_DIM",
    "MAX_STREAMS",
    "HELD_GROUP",
)


def layout() -> dict[str, str]:
    """Name -> numbers, as the lines of `gaq_layout`: sizes, offsets and sizes of fields, and constants."""
    found = {name: str(globals()[name]) for name in CONSTANTS}
    for structure in STRUCTURES:
        found[structure.__name__] = str(ctypes.sizeof(structure))
        for name in _kinds(structure):
            field = getattr(structure, name)
            found[f"{structure.__name__}.{name}"] = f"{field.offset} {field.size}"
    return found


def layout_mismatch(text: str) -> str | None:
    """The first difference between what a library says of its structures and these, or None. text: `gaq_layout`'s."""
    theirs = dict(line.split(" ", 1) for line in text.splitlines())
    ours = layout()
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            return f"{name} is {theirs.get(name, 'absent')} in C++ and {ours.get(name, 'absent')} in structures.py"
    return None
