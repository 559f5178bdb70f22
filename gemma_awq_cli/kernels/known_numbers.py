"""A trial of a packed linear on known numbers: no GPU was there to prove it on, so each one that comes must."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from gemma_awq_cli.awq.grid import Grid, dequantize
from gemma_awq_cli.awq.packing import PackedWeight, pack_weight
from gemma_awq_cli.system.failures import first_line

TOLERANCE = 0.01  # of the product: bfloat16 rounds by 0.4 %
_GROUP = 64


def problem_with(
    make: Callable[[PackedWeight], nn.Module],
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int],
    rows: Sequence[int],
) -> str | None:
    """Why a kind of linear is not to be used on a device in a dtype, or None.

    shape: outputs and inputs of the trial, whose groups are of 64; rows: how many rows are multiplied.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    q = torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8)
    sizes = torch.rand(shape[0], shape[1] // _GROUP, generator=generator)
    grid = Grid(
        (sizes + 0.5).to(torch.bfloat16).float(), torch.randint(0, 16, sizes.shape, generator=generator).float()
    )
    x = torch.randn(max(rows), shape[1], generator=generator).to(dtype)
    expected = x.float() @ dequantize(q, grid).t()
    try:
        linear = make(PackedWeight(*(tensor.to(device) for tensor in pack_weight(q, grid))))
        for count in rows:
            found = linear(x[:count].to(device)).cpu().float()
            if not (found - expected[:count]).norm() <= TOLERANCE * expected[:count].norm():  # also if it is NaN
                return f"it multiplies known numbers wrongly here ({count} rows)"
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return f"it fails here: {first_line(error)}"
    return None
