"""The loops of the searches and of the rounding that torch is slow at, in the compiled library, on the CPU.

Importing this file lets torch's dispatcher, where `awq` finds them, use the library inside of `compiled_columns`. Sums
are added up in another order than torch's, so of numbers that lie between two integers a few come out otherwise.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from gemma_awq_cli.awq.coordinate_descent import move_columns, move_columns_in_torch
from gemma_awq_cli.awq.gptq import round_columns, round_columns_in_torch
from gemma_awq_cli.awq.scale_descent import add_stretch, add_stretch_in_torch
from gemma_awq_cli.kernels.native.library import Library
from gemma_awq_cli.system.threads import thread_count

MOST_LANES = 16  # numbers in a register

_library: ContextVar[Library | None] = ContextVar("library", default=None)


@contextmanager
def compiled_columns(library: Library | None) -> Iterator[None]:
    """Walk the columns of weights on the CPU in the library; None: in torch."""
    token = _library.set(library)
    try:
        yield
    finally:
        _library.reset(token)


@round_columns.register_kernel("cpu")
def _(target: Tensor, work: Tensor, q: Tensor, near: Tensor, scale: Tensor, zero: Tensor, group_of: Tensor) -> None:
    if (library := _library.get()) is None:
        return round_columns_in_torch(target, work, q, near, scale, zero, group_of)
    turned = near.t().contiguous()  # what is done to a column is a row
    _require_plain(target, work, q, turned, scale, zero)
    library.round_columns(
        *(part.data_ptr() for part in (target, work, q, turned, scale, zero, _indices(group_of))),
        *target.shape, thread_count(),
    )  # fmt: skip
    return None


@move_columns.register_kernel("cpu")
def _(
    slope: Tensor,
    integers: Tensor,
    error: Tensor,
    near: Tensor,
    scale: Tensor,
    inverse: Tensor,
    curvature: Tensor,
    group_of: Tensor,
) -> None:
    if (library := _library.get()) is None:
        return move_columns_in_torch(slope, integers, error, near, scale, inverse, curvature, group_of)
    near = near.contiguous()
    _require_plain(slope, integers, error, near, scale, inverse, curvature)
    library.move_columns(
        *(part.data_ptr() for part in (slope, integers, error, near, scale, inverse, curvature, _indices(group_of))),
        *slope.shape, thread_count(),
    )  # fmt: skip
    return None


@add_stretch.register_kernel("cpu")
def _(weight: Tensor, scale: Tensor, share: float, spread: Tensor, stretch: Tensor) -> None:
    groups, group_size = stretch.shape
    if (library := _library.get()) is None or weight.stride(1) != 1 or group_size % MOST_LANES:
        return add_stretch_in_torch(weight, scale, share, spread, stretch)
    assert weight.dtype == torch.float32
    _require_plain(scale, spread, stretch)
    library.add_stretch(
        weight.data_ptr(), weight.stride(0), scale.data_ptr(), share, len(weight), groups, group_size,
        spread.data_ptr(), stretch.data_ptr(), thread_count(),
    )  # fmt: skip
    return None


def _require_plain(*parts: Tensor) -> None:
    for part in parts:
        assert part.dtype == torch.float32
        assert part.is_contiguous()


def _indices(group_of: Tensor) -> Tensor:
    assert group_of.dtype == torch.int64
    assert group_of.is_contiguous()
    return group_of
