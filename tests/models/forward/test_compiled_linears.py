"""Linears of measured rows in the compiled library: as precise as float32 sums, for stored and quantized weights."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gemma_awq_cli.kernels.native import library as native_library
from gemma_awq_cli.kernels.native.library import Library
from gemma_awq_cli.models.forward.compiled_linears import compiled_linears


@pytest.fixture(scope="module")
def library(native_folder: Path) -> Library:
    loaded = native_library.load(native_folder)
    if not isinstance(loaded, Library) or not loaded.multiplies_bfloat16:
        pytest.skip("needs a compiler and a processor that multiplies bfloat16")
    return loaded


class Layer(nn.Module):
    def __init__(self, weight: Tensor, bias: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
        self.linear.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@pytest.mark.parametrize("kind", ["16 bits", "4 bits", "float32"])
def test_they_are_as_exact_as_what_is_measured_needs(library: Library, kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(72, 130, generator=generator)
    if kind == "16 bits":
        weight = weight.to(torch.bfloat16).float()
    elif kind == "4 bits":
        scale = torch.rand(72, 1, generator=generator).to(torch.float16).float()
        weight = (weight * 3).round().clamp(-8, 7) * scale
    x = torch.randn(3, 5, 130, generator=generator)
    exact = x.double() @ weight.double().t()
    layer = Layer(weight)
    with compiled_linears(layer, library):
        found = layer(x)
    assert found.shape == (3, 5, 72)
    assert found.dtype == torch.float32
    assert (found - exact).norm() <= 2**-16 * exact.norm()
    assert not torch.equal(found, layer(x))  # torch multiplies again, and adds up in another order


def test_what_the_library_cannot_do_stays_torchs(library: Library) -> None:
    x, weight = torch.ones(2, 4), torch.eye(4)
    biased = Layer(weight, bias=True)
    expected = biased(x)
    with compiled_linears(biased, library):
        assert torch.equal(biased(x), expected)
    layer = Layer(weight)
    with compiled_linears(layer, None):
        assert "forward" not in vars(layer.linear)
    with pytest.raises(ZeroDivisionError), compiled_linears(layer, library):
        raise ZeroDivisionError
    assert "forward" not in vars(layer.linear)
