"""Linears of rows that are measured in the compiled library, in place of PyTorch's inside transformers' modules.

PyTorch has no faster way for float32 products on the CPU than plain ones, or ones that are too coarse to measure with.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

from torch import Tensor, nn

from gemma_awq_cli.kernels.bfloat16_products import Factor, multiply
from gemma_awq_cli.kernels.native.library import Library


@contextmanager
def compiled_linears(module: nn.Module, library: Library | None) -> Iterator[None]:
    """Let a layer's linears run in the library, exactly to about 2^-16; None: nowhere.

    module: a copy that is nobody else's, as `TextStack.layer` makes it.
    """
    if library is None:
        yield
        return
    replaced = {
        part: _linear(library, cast(Tensor, part.weight))
        for part in module.modules()
        if isinstance(part, nn.Linear) and part.bias is None
    }
    for linear, forward in replaced.items():
        linear.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        for linear in replaced:
            del linear.forward


def _linear(library: Library, weight: Tensor) -> Callable[[Tensor], Tensor]:
    factor = Factor(library, weight).shortest()

    def forward(x: Tensor) -> Tensor:
        return multiply(library, Factor(library, x.flatten(0, -2)), factor).view(*x.shape[:-1], factor.rows)

    return forward
