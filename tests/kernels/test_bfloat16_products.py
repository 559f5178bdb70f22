"""The compiled products of bfloat16 numbers: exact to float32 sums, for every shape, and the same on any threads."""

import copy

import pytest
import torch
from torch import Tensor

from gemma_awq_cli.awq.gram import IN_TORCH, TILE, InputStatistics, Sums, mirror
from gemma_awq_cli.kernels.bfloat16_products import Factor, attend, multiply, token_sums
from gemma_awq_cli.kernels.native.library import AMX, Library


@pytest.fixture(scope="module", params=["AVX512-BF16", AMX])
def library(library: Library, request: pytest.FixtureRequest) -> Library:
    if request.param not in library.products:
        pytest.skip(f"needs a processor with {request.param}")
    only = copy.copy(library)
    only.products = (request.param,)
    return only


def summed(sums: Sums, x: Tensor, roots: Tensor | None) -> tuple[Tensor, Tensor]:
    total, magnitudes = torch.zeros(x.shape[1], x.shape[1]), torch.zeros(x.shape[1])
    for part, own in zip(x.split(1100), [None] * 9 if roots is None else roots.split(1100), strict=False):
        sums.gram(total, magnitudes, part, own)
    mirror(total)
    return total, magnitudes


@pytest.mark.parametrize("tokens", [1, 7, 1025])
@pytest.mark.parametrize("columns", [8, 48, 96 + 40, TILE + 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weighted", [False, True])
def test_gram_matrix(library: Library, tokens: int, columns: int, dtype: torch.dtype, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(tokens * columns)
    wide = torch.randn(tokens, columns + 24, generator=generator).mul_(2.0).to(dtype)
    x = wide[:, 16 : 16 + columns]  # a block of a wider input
    roots = torch.rand(tokens, generator=generator) * 3 if weighted else None
    total, magnitudes = summed(token_sums(library), x, roots)
    rounded = (x.float() if roots is None else x.float() * roots[:, None]).bfloat16().double()
    expected = rounded.t() @ rounded
    size = rounded.abs().t() @ rounded.abs()
    assert ((total - expected).abs() <= 3e-6 * size + 1e-30).all()
    torch.testing.assert_close(magnitudes.double(), x.double().abs().sum(0), rtol=1e-5, atol=1e-6)
    assert torch.equal(total, total.t())
    # of the numbers that torch multiplies: they are rounded once
    torch.testing.assert_close(total, summed(IN_TORCH, x, roots)[0], rtol=0, atol=0.01 * float(size.max()))


def test_the_number_of_threads_changes_no_bit(library: Library) -> None:
    x = torch.randn(1500, 200, generator=torch.Generator().manual_seed(0))
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(summed(token_sums(library), x, x[:, 0].abs())[0])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_numbers_that_are_not_finite_show(library: Library) -> None:
    for wrong in (torch.nan, torch.inf):
        x = torch.ones(4, 64)
        x[2, 50] = wrong
        total, magnitudes = summed(token_sums(library), x, None)
        assert not total[50, 50].isfinite()
        assert not magnitudes[50].isfinite()
        assert total[49, 49] == 4


def test_statistics_of_blocks(library: Library) -> None:
    """Both ways give the same statistics of a block-wise Gram matrix, but for the rounding of the numbers."""
    x = torch.randn(3, 40, 128, generator=torch.Generator().manual_seed(1))
    weights = torch.rand(3, 40, generator=torch.Generator().manual_seed(2))
    reference = x + 0.1 * torch.randn(3, 40, 128, generator=torch.Generator().manual_seed(3))
    found = []
    for sums in (IN_TORCH, token_sums(library)):
        statistics = InputStatistics(128, 64, torch.device("cpu"), with_reference=True, sums=sums)
        statistics.add(x, weights, reference)
        statistics.finish()
        found.append(statistics)
    torch.testing.assert_close(found[0].gram, found[1].gram, rtol=0, atol=2e-3)
    torch.testing.assert_close(found[0].error_gram, found[1].error_gram, rtol=0, atol=2e-4)
    torch.testing.assert_close(found[0].mean_abs, found[1].mean_abs)


@pytest.mark.parametrize(
    ("rows", "heads", "groups", "tokens", "size", "window"),
    [(2, 4, 1, 70, 64, 999), (3, 4, 2, 129, 32, 40), (1, 2, 1, 200, 96, 33), (1, 2, 2, 33, 80, 5), (1, 1, 1, 1, 48, 1)],
)
def test_attention(library: Library, rows: int, heads: int, groups: int, tokens: int, size: int, window: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    q, k, v = (
        (2 * torch.randn(rows, tokens, count, size, generator=generator)).transpose(1, 2)
        for count in (heads, groups, groups)
    )
    place = torch.arange(tokens)
    seen = (place[:, None] >= place) & (place[:, None] - place < window)
    exact = torch.nn.functional.scaled_dot_product_attention(
        *(part.bfloat16().double() for part in (q, k, v)), attn_mask=seen, enable_gqa=True, scale=0.1
    )
    found = attend(library, q, k, v, 0.1, window)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact.transpose(1, 2), rtol=2**-7, atol=0.01)


def product(library: Library, left: Tensor, right: Tensor) -> Tensor:
    return multiply(library, Factor(library, left), Factor(library, right))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (9, 48, 64), (100, 131, 640), (161, 600, 1056 + 31)])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_product(library: Library, sizes: tuple[int, int, int], stored: torch.dtype) -> None:
    """Each number is a sum of two bfloat16 numbers: rounding it to one would miss these bounds by a hundred times."""
    generator = torch.Generator().manual_seed(0)
    rows, outputs, inputs = sizes
    left = torch.randn(rows, inputs, generator=generator)
    right = torch.randn(outputs, inputs, generator=generator).to(stored)
    exact = left.double() @ right.double().t()
    size = left.double().abs() @ right.double().abs().t()
    found = product(library, left, right)
    assert found.dtype == torch.float32
    assert ((found - exact).abs() <= 3 * 2**-17 * size).all()
    assert (found - exact).norm() <= 2**-16 * exact.norm()


def test_a_product_of_bfloat16_numbers_is_exact(library: Library) -> None:
    left = torch.arange(-64.0, 64.0).reshape(2, 64)
    right = torch.eye(64)[:40].to(torch.bfloat16)
    assert torch.equal(product(library, left.to(torch.bfloat16), right), left[:, :40])


def test_a_product_with_numbers_that_are_not_finite_shows_them(library: Library) -> None:
    left, right = torch.ones(40, 64), torch.ones(70, 64, dtype=torch.bfloat16)
    right[69, 3], left[39, 5] = torch.nan, torch.inf
    found = product(library, left, right)
    assert not found[:, 69].isfinite().any()
    assert not found[39].isfinite().any()
    assert (found[:39, :69] == 64).all()


def test_no_thread_changes_a_product(library: Library) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(300, 96, generator=generator), torch.randn(290, 96, generator=generator)
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(product(library, left, right))
    assert torch.equal(*found)


def test_torch_still_multiplies_tiles_after_the_library(library: Library) -> None:
    """Both say what the processor's tiles look like: neither may find the other's."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(160, 320, generator=generator).to(torch.bfloat16) for _ in range(2))
    expected = left @ right.t()
    for _ in range(3):
        first = product(library, left, right)
        assert torch.equal(left @ right.t(), expected)
        assert torch.equal(product(library, left, right), first)
        torch.testing.assert_close(first, expected.float(), rtol=2**-7, atol=1e-3)
