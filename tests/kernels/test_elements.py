"""Norms, GELU and rotations in the compiled library, against PyTorch in float64."""

import pytest
import torch
from torch import Tensor

from gemma_awq_cli.kernels.elements import gelu_tanh, rms_norm, rotate
from gemma_awq_cli.kernels.native.library import Library


def rounding(dtype: torch.dtype) -> float:
    return 2**-8 if dtype == torch.bfloat16 else 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 3), (3, 5, 64), (2, 131, 640 + 9)])
@pytest.mark.parametrize("scaled", [False, True])
def test_norm(library: Library, dtype: torch.dtype, shape: tuple[int, ...], scaled: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator) * torch.logspace(-4, 3, shape[1])[:, None]).to(dtype)
    gain = torch.randn(shape[-1], generator=generator) if scaled else None
    wide = x.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 if gain is None else gain.double())
    found = rms_norm(library, x, gain, 1e-6)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=rounding(dtype), atol=1e-30)


def test_dimensions_in_any_order(library: Library) -> None:
    """A head's norm gets rows whose heads were moved before the tokens; a part of a wider tensor is copied."""
    x = torch.randn(2, 7, 4, 32, generator=torch.Generator().manual_seed(0))
    plain = rms_norm(library, x, None, 1e-6)
    moved = rms_norm(library, x.transpose(1, 2), None, 1e-6)
    assert torch.equal(moved, plain.transpose(1, 2))
    assert moved.stride() == x.transpose(1, 2).stride()
    assert torch.equal(rms_norm(library, x[:, 1:5, ::2], None, 1e-6), plain[:, 1:5, ::2])
    turned = x.transpose(2, 3)
    assert torch.equal(rms_norm(library, turned, None, 1e-6), rms_norm(library, turned.contiguous(), None, 1e-6))
    assert torch.equal(rms_norm(library, x[:1].expand(3, -1, -1, -1), None, 1e-6)[2], plain[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 40_001])
def test_gelu(library: Library, dtype: torch.dtype, count: int) -> None:
    x = torch.linspace(-15, 15, count).to(dtype)
    exact = torch.nn.functional.gelu(x.double(), approximate="tanh")
    found = gelu_tanh(library, x)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=rounding(dtype), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 38, 256])
@pytest.mark.parametrize("own_places", [False, True])
def test_rotation(library: Library, dtype: torch.dtype, size: int, own_places: bool) -> None:
    """Of heads wherever they are in memory, with angles that differ between the halves and, if asked, the rows."""
    generator = torch.Generator().manual_seed(0)
    heads = torch.randn(3, 50, 5, size, generator=generator).to(dtype)
    cos, sin = torch.randn(2, 3 if own_places else 1, 50, size, generator=generator)
    wide = heads.transpose(1, 2).double()
    first, second = wide.chunk(2, dim=-1)
    exact = wide * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
    for x in (heads.transpose(1, 2), heads.transpose(1, 2).contiguous(), heads.flip(3).transpose(1, 2).flip(3)):
        found = rotate(library, x, cos, sin)
        assert found.dtype == dtype
        assert found.transpose(1, 2).is_contiguous()
        torch.testing.assert_close(found.double(), exact, rtol=rounding(dtype), atol=2e-6)


def test_numbers_that_are_not_finite_show(library: Library) -> None:
    x: Tensor = torch.ones(3, 40)
    x[1, 7] = torch.nan
    turned = rotate(library, x[None, None], torch.ones(1, 3, 40), torch.ones(1, 3, 40))[0, 0]
    for found in (rms_norm(library, x, None, 1e-6), gelu_tanh(library, x), turned):
        assert found[1, 7].isnan()
        assert found[0].isfinite().all()
