"""Norms and activations of transformers' layers in the compiled library: the same results, and never a wrong guess."""

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm

from gemma_awq_cli.kernels.native.library import Library
from gemma_awq_cli.models.forward.compiled_elements import compiled_elements


def norm(kind: type[nn.Module], **options: bool) -> nn.Module:
    made = kind(96, **options)
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data = 2 * torch.randn(parameter.shape, generator=generator)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_layers_compute_the_same(library: Library, dtype: torch.dtype) -> None:
    parts = nn.ModuleList(
        [
            norm(GemmaRMSNorm),
            norm(Gemma3RMSNorm),
            norm(Gemma4RMSNorm),
            norm(Gemma4RMSNorm, with_scale=False),
            ACT2FN["gelu_pytorch_tanh"],
        ]
    )
    x = (3 * torch.randn(2, 5, 96, generator=torch.Generator().manual_seed(1))).to(dtype)
    expected = [part(x) for part in parts]
    with compiled_elements(parts, library):
        assert all("forward" in vars(part) for part in parts)
        found = [part(x) for part in parts]
        assert parts[0](x.double()).dtype == torch.float64  # what the library does not know stays transformers'
    assert not any("forward" in vars(part) for part in parts)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


class CentredRMSNorm(nn.Module):
    """Not what its name says."""

    eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt()


@torch.inference_mode()
def test_what_computes_something_else_stays_as_it_is(library: Library) -> None:
    parts = nn.ModuleList(
        [
            CentredRMSNorm(),
            ACT2FN["gelu"],
            ACT2FN["silu"],
            nn.Dropout(),
            nn.Identity(),
            nn.Linear(96, 96),
            nn.RMSNorm(96),
        ]
    )
    with compiled_elements(parts, library):
        assert not any("forward" in vars(part) for part in parts)
    with compiled_elements(nn.ModuleList([norm(GemmaRMSNorm)]), None) as nothing:
        assert nothing is None


@torch.inference_mode()
def test_an_error_leaves_no_trace(library: Library) -> None:
    part = norm(GemmaRMSNorm)
    with pytest.raises(ZeroDivisionError), compiled_elements(part, library):
        raise ZeroDivisionError
    assert "forward" not in vars(part)
