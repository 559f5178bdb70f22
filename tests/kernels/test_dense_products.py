"""Products of 16-bit numbers, on a processor that multiplies them and on one that does not."""

import pytest
import torch
import torch.nn.functional as F

from gemma_awq_cli.kernels import dense_products
from gemma_awq_cli.kernels.dense_products import WORTH_WIDENING, linear, matmul, scaled_dot_product_attention

DTYPES = (torch.bfloat16, torch.float16)


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture(params=[False, True], ids=["widened", "as it is"])
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the processor is said to multiply 16-bit numbers. A weight is widened in several parts."""
    monkeypatch.setattr(dense_products, "multiplies_16bit", lambda dtype: request.param)
    monkeypatch.setattr(dense_products, "_WIDENED", 48 * 7)
    return bool(request.param)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (WORTH_WIDENING - 1,), (WORTH_WIDENING,), (33,), (3, 11)])
def test_a_linear_is_the_float32_product_rounded_once(
    shape: tuple[int, ...], dtype: torch.dtype, instructions: bool
) -> None:
    x, weight = numbers(*shape, 48).to(dtype), numbers(31, 48).to(dtype)
    exact = x.double() @ weight.double().t()
    found = linear(x, weight)
    assert found.dtype == dtype
    assert found.shape == exact.shape
    # half a unit of the last place, and the sums' own error
    torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps * 0.51, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 20])
def test_attention_is_that_of_float32(queries: int, dtype: torch.dtype, instructions: bool) -> None:
    q, k, v = (numbers(2, heads, count, 32).to(dtype) for heads, count in ((4, queries), (2, 24), (2, 24)))
    visible = torch.rand(2, 1, queries, 24, generator=torch.Generator().manual_seed(0)) < 0.7
    visible[..., 0] = True
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), visible, scale=0.2, enable_gqa=True)
    found = scaled_dot_product_attention(q, k, v, visible, 0.2)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("rows", [2, 16])
def test_a_product_of_stacks(rows: int, instructions: bool) -> None:
    left, right = numbers(2, 3, rows, 16).to(torch.bfloat16), numbers(2, 1, 16, 9).to(torch.bfloat16)
    found = matmul(left, right)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), left.double() @ right.double(), rtol=0.01, atol=0.02)


def test_float32_products_are_never_said_to_be_slow() -> None:
    assert dense_products.multiplies_16bit(torch.float32)
    assert {type(dense_products.multiplies_16bit(dtype)) for dtype in DTYPES} == {bool}
