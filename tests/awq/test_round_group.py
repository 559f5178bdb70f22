"""The linears of a group rounded at once: each row comes out as it would alone, in every split of the work."""

import pytest
import torch
from torch import Tensor

from gemma_awq_cli.awq import round_group
from gemma_awq_cli.awq.gram import InputStatistics
from gemma_awq_cli.awq.round_group import round_compensated, round_nearest, rounding_error
from gemma_awq_cli.awq.search import BALANCED

K, N, GROUP = 128, 48, 32


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """weight, columns, rows and the inputs."""
    torch.manual_seed(5)
    x = torch.randn(500, K) @ (torch.eye(K) + 0.2 * torch.randn(K, K))
    return torch.randn(N, K), torch.rand(K) + 0.5, torch.rand(N, 1) + 0.5, x


def gram_of(x: Tensor, block: int = K) -> Tensor:
    statistics = InputStatistics(K, block, torch.device("cpu"))
    statistics.add(x)
    statistics.finish()
    return statistics.gram


def test_the_error_is_that_of_the_linear_as_it_runs(problem: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    weight, columns, rows, x = problem
    gram = gram_of(x)
    for rounded in (
        round_nearest(weight, columns, rows, GROUP),
        round_compensated(weight, columns, rows, gram, GROUP, BALANCED),
    ):
        steps = rounded.q.unflatten(1, (-1, GROUP)).float() - rounded.grid.zero[:, :, None]
        stored = (steps * rounded.grid.scale[:, :, None]).flatten(1)
        expected = x @ weight.t() - (x / columns) @ (stored / rows).t()
        error = rounding_error(weight, columns, rows, rounded, gram)
        assert error == pytest.approx(float(expected.square().sum(1).mean()), rel=1e-3)


@pytest.mark.parametrize("block", [K, 64])
def test_rows_are_independent(
    problem: tuple[Tensor, Tensor, Tensor, Tensor], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, columns, rows, x = problem
    gram = gram_of(x, block)
    whole = round_compensated(weight, columns, rows, gram, GROUP, BALANCED)
    monkeypatch.setattr(round_group, "PART", 5 * K)
    for other in (
        round_compensated(weight, columns, rows, gram, GROUP, BALANCED),
        round_compensated(weight[16:], columns, rows[16:], gram, GROUP, BALANCED),
    ):
        # float32 sums may part at ties when they are split otherwise
        assert (other.q == whole.q[-other.q.shape[0] :]).float().mean() > 0.98
        assert torch.allclose(other.grid.scale, whole.grid.scale[-other.q.shape[0] :], rtol=0.02)


def test_each_block_beats_rounding_to_nearest(problem: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    weight, _, rows, x = problem
    ones = torch.ones(K)
    for block in (K, 64, GROUP):
        gram = gram_of(x, block)
        plain = rounding_error(weight, ones, rows, round_nearest(weight, ones, rows, GROUP), gram)
        found = rounding_error(weight, ones, rows, round_compensated(weight, ones, rows, gram, GROUP, BALANCED), gram)
        assert found < 0.9 * plain
