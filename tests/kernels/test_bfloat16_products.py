"""The compiled products of bfloat16 numbers: exact to float32 sums, for every shape, and the same on any threads."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from gemma_awq_cli.awq.gram import IN_TORCH, TILE, InputStatistics, Sums, mirror
from gemma_awq_cli.kernels.bfloat16_products import attend, multiply, token_sums
from gemma_awq_cli.kernels.native import library as native_library
from gemma_awq_cli.kernels.native.library import Library


@pytest.fixture(scope="module")
def library(native_folder: Path) -> Library:
    loaded = native_library.load(native_folder)
    if not isinstance(loaded, Library) or not loaded.multiplies_bfloat16:
        pytest.skip("needs a compiler and a processor with AVX512-BF16")
    return loaded


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
    [(2, 4, 1, 70, 64, 999), (3, 4, 2, 129, 32, 40), (1, 2, 2, 33, 80, 5), (1, 1, 1, 1, 48, 1)],
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


@pytest.mark.parametrize("sizes", [(1, 1, 2), (9, 48, 64), (100, 131, 640)])
def test_product(library: Library, sizes: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, outputs, inputs = sizes
    left, right = (torch.randn(count, inputs, generator=generator) for count in (rows, outputs))
    exact = left.bfloat16().double() @ right.bfloat16().double().t()
    torch.testing.assert_close(multiply(library, left, right).double(), exact, rtol=1e-5, atol=1e-4)
