"""Weights in the layout of linear.h, held as arrays, with the structure through which the library reads them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gemma_awq_cli.awq.packed_arrays import PackedArrays
from gemma_awq_cli.kernels.native.library import Library
from gemma_awq_cli.kernels.native.structures import BF16, BLOCK, INT4, INT4_BY_INPUT, MAX_PARTS, PADDED, LinearSpec
from gemma_awq_cli.system.arrays import BFLOAT16, Array, address
from gemma_awq_cli.system.threads import thread_count

_GROUP_SIZES = (32, 64, 128, 256)
ACTIVATION_GROUP = 32  # inputs of a row that share a scale: divides all of _GROUP_SIZES
_ALIGNED = 64  # bytes
_ROWS = 512 * BLOCK  # outputs that are quantized at a time


@dataclass(frozen=True)
class NativeLinear:
    """spec: what C++ reads; arrays: the owners of the memory that it points to."""

    spec: LinearSpec
    arrays: tuple[Array, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of weights that one row of activations reads."""
        return sum(array.nbytes for array in self.arrays)


def refusal(inputs: int, group_size: int) -> str | None:
    """Why the native integer kernels cannot take a linear, or None."""
    if group_size not in _GROUP_SIZES or inputs % group_size:
        return f"{inputs} inputs in groups of {group_size} do not fit its tiles"
    return None


class Arena:
    """Memory for packed weights, allocated once, in large pages where the system has them."""

    def __init__(self, library: Library, nbytes: int) -> None:
        memory = np.empty(nbytes + _ALIGNED, np.uint8)
        start = -address(memory) % _ALIGNED
        self._memory = memory[start : start + nbytes]
        library.large_pages(address(self._memory), nbytes)
        self._used = 0

    def take(self, nbytes: int) -> Array:
        """The next `nbytes` bytes, aligned to 64 bytes."""
        taken = self._memory[self._used : self._used + nbytes]
        assert taken.size == nbytes
        self._used += _rounded(nbytes)
        return taken


def packed_bytes(kind: int, inputs: int, outputs: int, group: int) -> tuple[int, int]:
    """Bytes of the blocks and of the zero points of one linear."""
    if kind == INT4_BY_INPUT:
        padded = -(-outputs // PADDED) * PADDED
        return inputs // group * padded * 2 + inputs * padded // 2, inputs // group * padded
    groups = -(-outputs // BLOCK) * (inputs // group)
    data = groups * (2 * BLOCK + group * BLOCK // (2 if kind == INT4 else 1))
    return data, groups * BLOCK if kind == INT4 else 0


def arena_bytes(kind: int, inputs: int, outputs: int, group: int) -> int:
    """How many bytes of an `Arena` one linear takes. group: ignored for BF16."""
    if kind == BF16:
        return _rounded(inputs * outputs * BFLOAT16.itemsize)
    return sum(map(_rounded, packed_bytes(kind, inputs, outputs, group)))


def from_awq(library: Library, packed: PackedArrays, arena: Arena, kind: int = INT4) -> NativeLinear:
    """Repack AutoAWQ's tensors. kind: INT4, or INT4_BY_INPUT for activations of which most are zero."""
    inputs, outputs = packed.qweight.shape[0], packed.scales.shape[1]
    group = inputs // packed.scales.shape[0]
    data, zeros = map(arena.take, packed_bytes(kind, inputs, outputs, group))
    # scales that float16 does not hold exactly are below its normal range: rounding them moves no weight visibly
    halved = packed._replace(scales=packed.scales.astype(np.float16, copy=False))
    qweight, qzeros, scales = map(np.ascontiguousarray, halved)
    assert [qweight.dtype, qzeros.dtype] == [np.int32, np.int32]
    library.pack_awq(
        kind, address(qweight), address(qzeros), address(scales), inputs, outputs, group,
        address(data), address(zeros), thread_count(),
    )  # fmt: skip
    return _integer(kind, inputs, outputs, group, ACTIVATION_GROUP, data, zeros)


def quantized(
    library: Library,
    weight: Array,
    kind: int,
    group: int,
    arena: Arena,
    on_read: Callable[[Array], None] = lambda rows: None,
) -> NativeLinear:
    """Quantize a 16-bit weight [N, K] in groups to int4 (asymmetric, the best of three ranges) or int8 (symmetric).

    on_read: called with some rows of the weight after the other, each time when they have been read.
    """
    weight = as_bfloat16(weight)
    outputs, inputs = weight.shape
    data, zeros = map(arena.take, packed_bytes(kind, inputs, outputs, group))
    for first in range(0, outputs, _ROWS):
        rows = weight[first : first + _ROWS]
        at, zeros_at = packed_bytes(kind, inputs, first, group)
        library.quantize(
            kind, address(rows), inputs, len(rows), group, address(data) + at, address(zeros) + zeros_at, thread_count()
        )
        on_read(rows)
    # four bits lose more than the activations' eight, however many share a scale
    activation_group = group if kind == INT4 else ACTIVATION_GROUP
    return _integer(kind, inputs, outputs, group, activation_group, data, zeros)


def dense(weights: Sequence[Array]) -> NativeLinear:
    """bfloat16 weights [N, K] that share an input, their outputs side by side, read where they are in memory."""
    assert len(weights) <= MAX_PARTS
    assert all(weight.dtype == BFLOAT16 for weight in weights)
    spec = LinearSpec(kind=BF16, inputs=weights[0].shape[1], outputs=sum(weight.shape[0] for weight in weights))
    for index, weight in enumerate(weights):
        spec.parts[index] = address(weight)
        spec.part_rows[index] = weight.shape[0]
    return NativeLinear(spec, tuple(weights))


def copied(weight: Array, arena: Arena) -> NativeLinear:
    """A weight [N, K] in bfloat16, copied into the arena's large pages."""
    copy = arena.take(weight.size * BFLOAT16.itemsize).view(BFLOAT16).reshape(weight.shape)
    copy[...] = weight
    return dense([copy])


def as_bfloat16(weight: Array) -> Array:
    """A contiguous weight in bfloat16, of the same memory where it is one already."""
    return np.ascontiguousarray(weight.astype(BFLOAT16, copy=False))


def apply(library: Library, linear: NativeLinear, x: Array) -> Array:
    """x: [R, K] float32 -> [R, N] float32."""
    x = np.ascontiguousarray(x, np.float32)
    result = np.empty((x.shape[0], linear.spec.outputs), np.float32)
    library.linear(linear.spec, address(x), x.shape[0], address(result), thread_count())
    return result


def _rounded(nbytes: int) -> int:
    return -(-nbytes // 64) * 64


def _integer(
    kind: int, inputs: int, outputs: int, group: int, activation_group: int, data: Array, zeros: Array
) -> NativeLinear:
    spec = LinearSpec(
        kind=kind, group=group, activation_group=activation_group, inputs=inputs, outputs=outputs,
        data=address(data), zeros=address(zeros),
    )  # fmt: skip
    return NativeLinear(spec, (data, zeros))
