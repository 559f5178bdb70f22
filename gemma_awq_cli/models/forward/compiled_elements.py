"""Norms, activations and rotations of whole rows in the compiled library, in place of PyTorch's inside transformers."""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from gemma_awq_cli.kernels.elements import DTYPES, gelu_tanh, rms_norm, rotate
from gemma_awq_cli.kernels.native.library import Library

_ROTATION = "apply_rotary_pos_emb"  # what transformers calls it, in each file of a model
_NEARLY = 1e-5  # by how much of it a result may differ: sums are added up in another order

Forward = Callable[[Tensor], Tensor]


@contextmanager
def compiled_elements(module: nn.Module, library: Library | None) -> Iterator[None]:
    """Let a layer's norms, its GELU and its rotations run in the library, wherever it computes the same; None: nowhere.

    Whether it does is tried on a few numbers. module: a copy that is nobody else's, as `TextStack.layer` makes it. The
    rotations are those of all models in the same files of transformers.
    """
    if library is None:
        yield
        return
    rotations = _rotations(library, module)
    replaced = {}
    for part in module.modules():
        forward = _norm(library, part) if type(part).__name__.endswith("RMSNorm") else _gelu(library, part)
        if forward is not None:
            replaced[part] = _on_known_dtypes(part.forward, forward)
    for part, forward in replaced.items():
        part.forward = forward
    for home, (_, rotation) in rotations.items():
        setattr(home, _ROTATION, rotation)
    try:
        yield
    finally:
        for part in replaced:
            del part.forward
        for home, (own, _) in rotations.items():
            setattr(home, _ROTATION, own)


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
    return forward if _agree(module.forward, forward, numbers) else None


def _gelu(library: Library, module: nn.Module) -> Forward | None:
    """See `compiled_elements`. Only a module without submodules and parameters can be an activation."""
    if next(module.children(), None) is not None or next(module.parameters(), None) is not None:
        return None

    def forward(x: Tensor) -> Tensor:
        return gelu_tanh(library, x)

    return forward if _agree(module.forward, forward, torch.linspace(-12, 12, 515)) else None


Rotation = Callable[..., Any]


def _rotations(library: Library, module: nn.Module) -> dict[ModuleType, tuple[Rotation, Rotation]]:
    """The files that a layer's modules are from: their own rotations, and what may replace them."""
    homes = [home for name in {type(part).__module__ for part in module.modules()} if (home := sys.modules.get(name))]
    own = {home: getattr(home, _ROTATION) for home in homes if callable(getattr(home, _ROTATION, None))}
    found = ((home, rotation, _rotation(library, rotation)) for home, rotation in own.items())
    return {home: (rotation, compiled) for home, rotation, compiled in found if compiled is not None}


def _rotation(library: Library, own: Rotation) -> Rotation | None:
    """A rotation in the library that computes what transformers' own does, in the dtype of what is rotated.

    own: of queries and keys together, or of one of them, with the dimension of the heads as its last argument.
    """
    together = [*inspect.signature(own).parameters][:2] == ["q", "k"]

    def one(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
        turned = rotate(library, x if heads == 1 else x.transpose(1, 2), cos, sin)
        return turned if heads == 1 else turned.transpose(1, 2)

    def both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
        if not all(_turns(x, cos, unsqueeze_dim) for x in (q, k)):
            return own(q, k, cos, sin, unsqueeze_dim)
        return one(q, cos, sin, unsqueeze_dim), one(k, cos, sin, unsqueeze_dim)

    def alone(x: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
        return one(x, cos, sin, unsqueeze_dim) if _turns(x, cos, unsqueeze_dim) else own(x, cos, sin, unsqueeze_dim)

    compiled: Rotation = both if together else alone
    x, cos = _numbers(2, 3, 3, 38), _numbers(1, 3, 38)
    turned = (x, x + 1) if together else (x,)
    return compiled if all(_agree(own, compiled, *turned, cos, cos + 1, heads) for heads in (1, 2)) else None


def _turns(x: Tensor, cos: Tensor, heads: int) -> bool:
    """Whether the library takes such heads, whose dimension is `heads`, and such angles."""
    tokens = x.shape[3 - heads] if x.ndim == 4 and heads in (1, 2) else None
    return (
        x.dtype in DTYPES
        and cos.dtype == torch.float32
        and x.shape[-1] % 2 == 0
        and any(cos.shape == (rows, tokens, x.shape[-1]) for rows in (1, x.shape[0]))
    )


def _numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _agree(own: Callable[..., Any], compiled: Callable[..., Any], *given: Any) -> bool:
    """Whether both compute the same tensor, or tensors. own: a module's `forward`, which calls none of its hooks."""
    try:
        expected = own(*given)
    except (TypeError, ValueError, RuntimeError, IndexError):  # it takes something else
        return False
    found = compiled(*given)
    if isinstance(expected, tuple) and isinstance(found, tuple) and len(expected) == len(found):
        return all(map(_near, expected, found))
    return _near(expected, found)


def _near(expected: Any, found: Any) -> bool:
    return (
        isinstance(expected, Tensor)
        and isinstance(found, Tensor)
        and expected.shape == found.shape
        and bool(((expected - found).abs() <= _NEARLY * expected.abs() + 1e-6).all())
    )
