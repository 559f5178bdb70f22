"""What a layer computes of each token, in the compiled library: the same as transformers, and never a wrong guess."""

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.gemma3n import modeling_gemma3n
from transformers.models.gemma4 import modeling_gemma4
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


def module_of(home: ModuleType) -> nn.Module:
    """A module whose class is from a file of transformers, or from what stands for one."""
    kind = type("Part", (nn.Module,), {"__module__": home.__name__})
    module: nn.Module = kind()
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("home", [modeling_gemma2, modeling_gemma3, modeling_gemma3n, modeling_gemma4])
@torch.inference_mode()
def test_rotations_compute_the_same(library: Library, home: ModuleType, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    angles = torch.randn(1, 7, 64, generator=generator)
    cos, sin = angles.cos(), angles.sin()
    own = home.apply_rotary_pos_emb
    together = home in (modeling_gemma2, modeling_gemma3)
    q, k = (torch.randn(2, 7, heads, 64, generator=generator).to(dtype) for heads in (4, 1))
    given = (q.transpose(1, 2), k.transpose(1, 2), cos, sin) if together else (q, cos, sin, 2)
    odd = (*(part.double() for part in given[: 2 if together else 1]), *given[2 if together else 1 :])
    with compiled_elements(module_of(home), library):
        assert home.apply_rotary_pos_emb is not own
        found, wide = home.apply_rotary_pos_emb(*given), home.apply_rotary_pos_emb(*odd)
    assert home.apply_rotary_pos_emb is own
    pairs = zip(found, own(*given), wide, strict=True) if together else [(found, own(*given), wide)]
    for one, expected, from_wide in pairs:
        assert one.dtype == dtype
        assert from_wide.dtype == torch.float64  # which the library does not know
        torch.testing.assert_close(one, expected.to(dtype), rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


@torch.inference_mode()
def test_another_rotation_stays_as_it_is(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped(x: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Tensor:
        return x * sin.unsqueeze(unsqueeze_dim) + x * cos.unsqueeze(unsqueeze_dim)

    def something(_: Tensor) -> None:
        return None

    def of_queries_alone(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Tensor:
        return q * cos.unsqueeze(unsqueeze_dim) + k * sin.unsqueeze(unsqueeze_dim)

    home = ModuleType("unknown_model")
    monkeypatch.setitem(sys.modules, home.__name__, home)
    for own in (swapped, something, of_queries_alone, None):
        home.apply_rotary_pos_emb = own  # type: ignore[attr-defined]
        with compiled_elements(module_of(home), library):
            assert home.apply_rotary_pos_emb is own
    with pytest.raises(ZeroDivisionError), compiled_elements(module_of(modeling_gemma3), library):
        raise ZeroDivisionError
    assert modeling_gemma3.apply_rotary_pos_emb.__module__ == modeling_gemma3.__name__
