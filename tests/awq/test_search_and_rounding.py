"""Each step must earn its place: lower calibration error than rounding to nearest where activations have outliers."""

import pytest
import torch
from torch import Tensor

from gemma_awq_cli.awq.gram import TILE, InputStatistics, block_width, output_error, scaled_gram
from gemma_awq_cli.awq.grid import Grid, dequantize, minmax_grid, nearest
from gemma_awq_cli.awq.rounding import DAMPING, compensated
from gemma_awq_cli.awq.search import group_gram, search_range, search_scale

K, N, GROUP = 128, 64, 32


def outlier_rows(rows: int = 400) -> Tensor:
    """Correlated inputs in which a few channels are 30 times larger."""
    torch.manual_seed(3)
    x = torch.randn(rows, K) @ (torch.eye(K) + 0.2 * torch.randn(K, K))
    x[:, [7, 40, 77]] *= 30
    return x


def statistics_of(x: Tensor, block: int = K) -> InputStatistics:
    statistics = InputStatistics(K, block, torch.device("cpu"))
    for part in x.split(150):
        statistics.add(part)
    statistics.finish()
    return statistics


def test_gram_error_is_the_output_error() -> None:
    x, error = outlier_rows(), torch.randn(N, K)
    statistics = statistics_of(x)
    expected = float((x @ error.t()).square().sum(1).mean())
    assert output_error(error, statistics.gram) == pytest.approx(expected, rel=1e-4)
    assert torch.allclose(statistics.mean_abs, x.abs().mean(0), rtol=1e-5)


def test_a_gram_of_many_tiles_is_whole() -> None:
    x = torch.randn(300, 2 * TILE + 64, generator=torch.Generator().manual_seed(0))
    weights = torch.rand(300, generator=torch.Generator().manual_seed(1))
    statistics = InputStatistics(x.shape[1], x.shape[1], torch.device("cpu"))
    for part, own in zip(x.split(150), weights.split(150), strict=True):
        statistics.add(part, own)
    statistics.finish()
    assert torch.allclose(statistics.gram[0], (x.t() * weights) @ x / 300, atol=1e-5)


def test_blocks_hold_the_diagonal_of_the_whole_gram() -> None:
    x = outlier_rows()
    whole, blocks = statistics_of(x).gram, statistics_of(x, block=64).gram
    assert blocks.shape == (2, 64, 64)
    assert torch.allclose(blocks[1], whole[0, 64:, 64:], rtol=1e-5)
    assert torch.equal(group_gram(blocks, GROUP), group_gram(blocks, GROUP).transpose(1, 2))
    assert torch.allclose(group_gram(whole, GROUP)[3], whole[0, 96:, 96:])


def test_block_width_divides_into_whole_groups() -> None:
    assert block_width(2048, 128, 16384) == 2048
    assert block_width(24576, 128, 16384) == 12288
    assert block_width(36864, 128, 16384) == 12288


def test_scaled_gram_is_the_gram_of_the_scaled_input() -> None:
    x, scale = outlier_rows(), torch.rand(K) + 0.5
    assert torch.allclose(
        scaled_gram(statistics_of(x).gram, scale), statistics_of(x / scale).gram, rtol=1e-3, atol=1e-4
    )


def test_scale_search_beats_round_to_nearest_on_outliers() -> None:
    x = outlier_rows()
    weights = [torch.randn(N, K), torch.randn(2 * N, K)]
    statistics = statistics_of(x)
    choice = search_scale(weights, statistics.mean_abs, statistics.gram, GROUP, lambda scale: scale)

    def error_of(scale: Tensor) -> float:
        return sum(
            float((x @ ((nearest(w * scale, minmax_grid(w * scale, GROUP)) - w * scale) / scale).t()).square().sum())
            for w in weights
        )

    assert error_of(choice.scale) < 0.7 * error_of(torch.ones(K))


def test_range_search_never_loses_to_minmax() -> None:
    x, weight = outlier_rows(), torch.randn(N, K)
    gram = statistics_of(x, block=GROUP).gram  # what the range search sees of the inputs
    found = output_error(nearest(weight, search_range(weight, gram, GROUP)) - weight, gram)
    plain = output_error(nearest(weight, minmax_grid(weight, GROUP)) - weight, gram)
    assert found < plain


@pytest.mark.parametrize("block", [K, 64])
def test_compensation_beats_nearest_on_the_same_grid(block: int) -> None:
    gram = statistics_of(outlier_rows(), block).gram
    weight = torch.randn(N, K)
    grid = minmax_grid(weight, GROUP)
    q = compensated(weight, grid, gram, damping=0.01)  # the paper's; these outliers are not scaled away first
    assert q.min() >= 0
    assert q.max() <= 15
    assert output_error(dequantize(q, grid) - weight, gram) < 0.6 * output_error(nearest(weight, grid) - weight, gram)


def test_compensation_is_the_textbook_recursion() -> None:
    """Against a plain transcription of the GPTQ paper's algorithm 1: the inverse's factor, one column a step."""
    gram = statistics_of(outlier_rows()).gram
    weight = torch.randn(8, K)
    grid = minmax_grid(weight, GROUP)
    order = torch.argsort(gram[0].diagonal(), descending=True, stable=True)
    damped = gram[0][order][:, order].double()
    damped += DAMPING * damped.diagonal().mean() * torch.eye(K, dtype=torch.float64)
    factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    work, expected = weight[:, order].double(), torch.empty(8, K)
    for i in range(K):
        column = Grid(grid.scale[:, [order[i] // GROUP]].double(), grid.zero[:, [order[i] // GROUP]].double())
        rounded = (torch.round(work[:, [i]] / column.scale) + column.zero).clamp(0, 15)
        expected[:, order[i]] = rounded[:, 0].float()
        error = (work[:, i] - ((rounded - column.zero) * column.scale)[:, 0]) / factor[i, i]
        work[:, i + 1 :] -= error[:, None] * factor[i, i + 1 :]
    # float32 and float64 may part at ties; they hardly ever do
    assert (compensated(weight, grid, gram) == expected).float().mean() > 0.98


def test_a_singular_gram_is_damped_until_it_can_be_factored() -> None:
    gram = torch.ones(1, K, K)
    weight = torch.randn(4, K)
    assert torch.isfinite(compensated(weight, minmax_grid(weight, GROUP), gram)).all()
    assert torch.isfinite(compensated(weight, minmax_grid(weight, GROUP), torch.zeros(1, K, K))).all()
