"""Triton kernels for the loops over columns of compensated rounding and of coordinate descent. Imports triton.

A column's integers depend on the errors of the columns before it, so torch starts a dozen kernels for each column. Here
one kernel walks `COLUMNS` of them, for a few rows each, in the order and with the roundings of torch's loops.
"""

import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 128  # that one kernel walks; a smaller rest is another kernel
_ROWS = 16  # of the weight, for one program


@triton.jit
def _to_even(x):
    """x rounded as `torch.round` does, for |x| < 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _round(
    target, work, q, near, scale, zero, group_of, count, rows, near_row, near_column,
    WIDTH: tl.constexpr, ROWS: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """One block of `count` columns: see `gptq.round_columns_in_torch`. near: by the strides of its rows and columns."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    keep = row < rows
    column = tl.arange(0, WIDTH)
    wanted = tl.load(
        target + column[:, None] * rows + row[None, :], mask=(column[:, None] < count) & keep[None, :], other=0.0
    )
    for i in range(count):
        own = tl.sum(tl.where(column[:, None] == i, wanted, 0.0), 0)
        group = tl.load(group_of + i)
        s = tl.load(scale + group * rows + row, mask=keep, other=1.0)
        z = tl.load(zero + group * rows + row, mask=keep, other=0.0)
        integer = tl.minimum(tl.maximum(_to_even(tl.div_rn(own, s) + z), 0.0), 15.0)
        weight = tl.load(work + i * rows + row, mask=keep, other=0.0)
        error = (integer - z) * s - weight
        tl.store(q + i * rows + row, integer, mask=keep)
        tl.store(work + i * rows + row, error, mask=keep)
        later = (column > i) & (column < count)
        share = tl.load(near + i * near_row + column * near_column, mask=later, other=0.0)
        wanted = wanted - share[:, None] * error[None, :]


def round_columns(
    target: Tensor, work: Tensor, q: Tensor, near: Tensor, scale: Tensor, zero: Tensor, group_of: Tensor
) -> None:
    """See `gptq.round_columns_in_torch`."""
    rows = work.shape[1]
    for first in range(0, len(work), COLUMNS):
        last = min(first + COLUMNS, len(work))
        own = near[first:last, first:last]
        _round[(triton.cdiv(rows, _ROWS),)](
            target[first:last], work[first:last], q[first:last], own, scale, zero, group_of[first:last],
            last - first, rows, own.stride(0), own.stride(1), WIDTH=COLUMNS, ROWS=_ROWS,
        )  # fmt: skip
        target[last:].addmm_(near[first:last, last:].t(), work[first:last], alpha=-1.0)


@triton.jit
def _move(
    slope, integers, error, near, scale, inverse, curvature, group_of, count, rows, near_row, near_column,
    WIDTH: tl.constexpr, ROWS: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """One block of `count` columns: see `coordinate_descent.move_columns_in_torch`.

    slope becomes what the columns moved by.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    keep = row < rows
    column = tl.arange(0, WIDTH)
    part = tl.load(
        slope + column[:, None] * rows + row[None, :], mask=(column[:, None] < count) & keep[None, :], other=0.0
    )
    for i in range(count):
        own = tl.sum(tl.where(column[:, None] == i, part, 0.0), 0)
        group = tl.load(group_of + i)
        bend = tl.load(curvature + i)
        s = tl.load(scale + group * rows + row, mask=keep, other=1.0)
        back = tl.load(inverse + group * rows + row, mask=keep, other=1.0)
        before = tl.load(integers + i * rows + row, mask=keep, other=0.0)
        step = own * back * tl.div_rn(-1.0, tl.where(bend > 0, bend, 1.0))
        best = tl.minimum(tl.maximum(_to_even(before + step), 0.0), 15.0)
        after = tl.where(bend > 0, best, before)
        moved = (after - before) * s
        tl.store(integers + i * rows + row, after, mask=keep)
        was = tl.load(error + i * rows + row, mask=keep, other=0.0)
        tl.store(error + i * rows + row, was + moved, mask=keep)
        tl.store(slope + i * rows + row, moved, mask=keep)
        later = (column > i) & (column < count)
        share = tl.load(near + column * near_row + i * near_column, mask=later, other=0.0)
        part = part + share[:, None] * moved[None, :]


def move_columns(
    slope: Tensor,
    integers: Tensor,
    error: Tensor,
    near: Tensor,
    scale: Tensor,
    inverse: Tensor,
    curvature: Tensor,
    group_of: Tensor,
) -> None:
    """See `coordinate_descent.move_columns_in_torch`."""
    rows = integers.shape[1]
    for first in range(0, len(integers), COLUMNS):
        last = min(first + COLUMNS, len(integers))
        own = near[first:last, first:last]
        _move[(triton.cdiv(rows, _ROWS),)](
            slope[first:last], integers[first:last], error[first:last], own, scale, inverse, curvature[first:last],
            group_of[first:last], last - first, rows, own.stride(0), own.stride(1), WIDTH=COLUMNS, ROWS=_ROWS,
        )  # fmt: skip
        slope[last:].addmm_(near[last:, first:last], slope[first:last])
