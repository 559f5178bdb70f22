"""Norms and activations of whole rows in the compiled library, in place of PyTorch's inside transformers' modules."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gemma_awq_cli.kernels.elements import DTYPES, gelu_tanh, rms_norm
from gemma_awq_cli.kernels.native.library import Library

_NEARLY = 1e-5  # by how much of it a result may differ: sums are added up in another order

Forward = Callable[[Tensor], Tensor]


@contextmanager
def compiled_elements(module: nn.Module, library: Library | None) -> Iterator[None]:
    """Let a layer's norms and its GELU run in the library, wherever that computes the same; None: nowhere.

    Whether it does is tried on a few numbers. module: a copy that is nobody else's, as `TextStack.layer` makes it.
    """
    if library is None:
        yield
        return
    replaced = {}
    for part in module.modules():
        forward = _norm(library, part) if type(part).__name__.endswith("RMSNorm") else _gelu(library, part)
        if forward is not None:
            replaced[part] = _on_known_dtypes(part.forward, forward)
    for part, forward in replaced.items():
        part.forward = forward
    try:
        yield
    finally:
        for part in replaced:
            del part.forward


def _on_known_dtypes(own: Forward, forward: Forward) -> Forward:
    return lambda x: forward(x) if x.dtype in DTYPES else own(x)


def _norm(library: Library, module: nn.Module) -> Forward | None:
    eps, weight = getattr(module, "eps", None), getattr(module, "weight", None)
    if not isinstance(eps, float):
        return None
    gain = None
    if weight is not None:
        # whether the stored gain is the factor or what it has more than 1, the module knows
        gain = (module.forward(torch.ones(1, len(weight)))[0] * (1 + eps) ** 0.5).contiguous()

    def forward(x: Tensor) -> Tensor:
        return rms_norm(library, x, gain, eps)

    numbers = _numbers(7, 64 if gain is None else len(gain)) * torch.logspace(-4, 3, 7)[:, None]
    return forward if _agree(module, forward, numbers) else None


def _gelu(library: Library, module: nn.Module) -> Forward | None:
    """See `compiled_elements`. Only a module without submodules and parameters can be an activation."""
    if next(module.children(), None) is not None or next(module.parameters(), None) is not None:
        return None

    def forward(x: Tensor) -> Tensor:
        return gelu_tanh(library, x)

    return forward if _agree(module, forward, torch.linspace(-12, 12, 515)) else None


def _numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _agree(module: nn.Module, forward: Forward, numbers: Tensor) -> bool:
    try:
        expected = module.forward(numbers)  # without its hooks
    except (TypeError, ValueError, RuntimeError, IndexError):  # it takes something else
        return False
    found = forward(numbers)
    return (
        isinstance(expected, Tensor)
        and expected.shape == found.shape
        and bool(((expected - found).abs() <= _NEARLY * expected.abs() + 1e-6).all())
    )
