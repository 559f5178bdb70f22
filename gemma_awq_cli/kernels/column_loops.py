"""The loops over columns of compensated rounding and of coordinate descent, one kernel for 128 columns on a GPU.

Importing this file gives Triton's kernels to torch's dispatcher, where `awq` finds them. This project has never run
them on a GPU: in Triton's interpreter they make torch's integers. So a GPU must first make of known numbers the
integers that torch makes there, or torch goes on to walk the columns.
"""

import importlib.util
from functools import cache

import torch
from torch import Tensor

from gemma_awq_cli.awq.coordinate_descent import move_columns, move_columns_in_torch
from gemma_awq_cli.awq.gptq import round_columns, round_columns_in_torch
from gemma_awq_cli.kernels.known_numbers import problem_in

_KNOWN_COLUMNS, _KNOWN_ROWS, _KNOWN_GROUP = 160, 16, 32
_DIFFERENT = 0.02  # of the integers of known numbers: another order of sums moves some that lie between two


@round_columns.register_kernel("cuda")
def _(target: Tensor, work: Tensor, q: Tensor, near: Tensor, scale: Tensor, zero: Tensor, group_of: Tensor) -> None:
    if columns_problem(work.device) is not None:
        return round_columns_in_torch(target, work, q, near, scale, zero, group_of)
    from gemma_awq_cli.kernels import triton_columns

    with torch.cuda.device(work.device):
        return triton_columns.round_columns(target, work, q, near, scale, zero, group_of)


@move_columns.register_kernel("cuda")
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
    if columns_problem(integers.device) is not None:
        return move_columns_in_torch(slope, integers, error, near, scale, inverse, curvature, group_of)
    from gemma_awq_cli.kernels import triton_columns

    with torch.cuda.device(integers.device):
        return triton_columns.move_columns(slope, integers, error, near, scale, inverse, curvature, group_of)


def columns_walked_by(device: torch.device) -> str:
    """Return a name of the code that walks the columns of weights on a device: integers may differ with it."""
    if device.type != "cuda" or columns_problem(device) is not None:
        return "PyTorch"
    import triton

    return f"Triton {triton.__version__}"


@cache
def columns_problem(device: torch.device) -> str | None:
    """Why a GPU's columns are walked by torch, or None if the kernels do it."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    from gemma_awq_cli.kernels import triton_columns

    def walk() -> str | None:
        with torch.cuda.device(device):
            different = different_integers(triton_columns.round_columns, triton_columns.move_columns, device)
        return None if different <= _DIFFERENT else f"{different:.0%} of known integers come out otherwise here"

    return problem_in(walk, "they fail here")


def different_integers(rounding: object, moving: object, device: torch.device) -> float:
    """The share of the integers of known numbers that two functions make otherwise than torch's loops on a device."""
    assert callable(rounding)
    assert callable(moving)
    generator = torch.Generator("cpu").manual_seed(0)

    def known(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    work, mixed = known(_KNOWN_COLUMNS, _KNOWN_ROWS), known(_KNOWN_COLUMNS, _KNOWN_COLUMNS)
    gram = mixed @ mixed.t() / _KNOWN_COLUMNS + torch.eye(_KNOWN_COLUMNS, device=device)
    near = (gram / gram.diagonal()).triu()
    groups = _KNOWN_COLUMNS // _KNOWN_GROUP
    scale = known(groups, _KNOWN_ROWS).abs() * 0.1 + 0.2
    zero = torch.full_like(scale, 8.0)
    group_of = torch.arange(_KNOWN_COLUMNS, device=device) // _KNOWN_GROUP
    found = []
    for walk, move in ((round_columns_in_torch, move_columns_in_torch), (rounding, moving)):
        target, errors, q = work.clone(), work.clone(), torch.empty_like(work)
        walk(target, errors, q, near, scale, zero, group_of)
        moved = q.clone()
        slope = gram @ errors
        move(slope, moved, errors, gram, scale, scale.reciprocal(), gram.diagonal().contiguous(), group_of)
        found += [torch.cat([q, moved])]
    return float((found[0] != found[1]).float().mean())
