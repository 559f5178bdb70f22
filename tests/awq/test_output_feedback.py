"""Feedback between rows: what later rows are moved by is the minimum of the loss, given the errors of earlier ones."""

import pytest
import torch
from torch import Tensor

from gemma_awq_cli.awq import output_feedback
from gemma_awq_cli.awq.gptq import damping_amount
from gemma_awq_cli.awq.gram import InputStatistics
from gemma_awq_cli.awq.grid import dequantize
from gemma_awq_cli.awq.output_feedback import OutputFeedback
from gemma_awq_cli.awq.round_group import Rounded, round_compensated
from gemma_awq_cli.awq.search import BALANCED, FAST

N, K, GROUP = 40, 64, 32


def information(count: int, seed: int = 0) -> Tensor:
    """Of outputs whose errors add up or cancel, and matter to different degrees."""
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(300, count, generator=generator) @ torch.randn(count, count, generator=generator)
    gradients *= torch.rand(count, generator=generator) + 0.1
    return gradients.t() @ gradients / 300


def damped(matrix: Tensor, damping: float) -> Tensor:
    return matrix + damping_amount(matrix, damping) * torch.eye(len(matrix))


@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_each_turn_gets_what_minimizes_the_loss(damping: float) -> None:
    torch.manual_seed(1)
    matrix, gram, inputs = information(N), information(12, seed=2), 12
    feedback = OutputFeedback([matrix], damping)
    assert feedback.turns == 5  # of 8 rows: a sixth would be fewer
    full = damped(matrix, damping).double()
    done = torch.empty(0, dtype=torch.int64)
    error = torch.zeros(N, inputs)
    for turn in range(feedback.turns):
        own = feedback.rows(turn)
        left = torch.tensor([row for row in range(N) if row not in done.tolist()])
        # the minimum over the errors of all rows that are left, found by solving for where the loss has no slope
        free = torch.zeros(len(left), inputs, dtype=torch.float64, requires_grad=True)

        def loss(free: Tensor, left: Tensor = left) -> Tensor:
            whole = error.double().index_copy(0, left, free)
            return torch.einsum("nk,nm,ml,kl->", whole, full, whole, gram.double())

        (slope,) = torch.autograd.grad(loss(free), free)
        curvature = torch.kron(full[left][:, left], gram.double()) * 2
        best = -torch.linalg.solve(curvature, slope.flatten()).view(len(left), inputs)
        places = [left.tolist().index(row) for row in own.tolist()]
        wanted = feedback.wanted_error(turn, error)
        torch.testing.assert_close(wanted.double(), best[places], rtol=1e-3, atol=1e-4)
        error[own] = wanted + 0.1 * torch.randn(len(own), inputs)  # as rounding would leave it
        done = torch.cat([done, own])
    assert sorted(done.tolist()) == list(range(N))
    diagonal = matrix.diagonal()[done]
    assert torch.equal(diagonal, diagonal.sort(descending=True).values)


def test_matrices_give_each_other_no_feedback() -> None:
    sizes = (24, 100, 3)
    matrices = [information(size, seed=size) for size in sizes]
    together, error = OutputFeedback(matrices, 0.5), torch.randn(sum(sizes), K)
    assert together.outputs == sum(sizes)
    assert together.turns == 6
    assert sorted(torch.cat([together.rows(turn) for turn in range(6)]).tolist()) == list(range(sum(sizes)))
    for turn in range(6):
        expected, rows, first = [], [], 0
        for matrix in matrices:
            alone = OutputFeedback([matrix], 0.5)
            if turn < alone.turns:
                expected.append(alone.wanted_error(turn, error[first : first + len(matrix)]))
                rows.append(alone.rows(turn) + first)
            first += len(matrix)
        assert torch.equal(together.wanted_error(turn, error), torch.cat(expected))
        assert torch.equal(together.rows(turn), torch.cat(rows))


def whole_loss(rounded: Rounded, weight: Tensor, columns: Tensor, rows: Tensor, gram: Tensor, matrix: Tensor) -> float:
    error = dequantize(*rounded) / columns / rows - weight
    return float(torch.einsum("nk,nm,mk->", error, matrix, error @ gram))


@pytest.mark.parametrize("block", [K, GROUP])
@pytest.mark.parametrize("effort", [FAST, BALANCED])
def test_rounding_with_feedback_loses_less(effort: object, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    x = torch.randn(500, K) @ (torch.eye(K) + 0.2 * torch.randn(K, K))
    weight, columns, rows = torch.randn(N, K), torch.rand(K) + 0.5, torch.rand(N, 1) + 0.5
    statistics = InputStatistics(K, block, torch.device("cpu"))
    statistics.add(x)
    statistics.finish()
    gram, matrix = statistics.gram, information(N)
    whole = torch.block_diag(*gram)
    arguments = (weight, columns, rows, gram, GROUP, effort)
    alone = round_compensated(*arguments)  # type: ignore[arg-type]
    fed = round_compensated(*arguments, OutputFeedback([matrix], 0.1))  # type: ignore[arg-type]
    before, after = (whole_loss(one, weight, columns, rows, whole, matrix) for one in (alone, fed))
    assert after < 0.8 * before
    # outputs that do not matter to each other are rounded as they are alone
    same = round_compensated(*arguments, OutputFeedback([torch.diag(matrix.diagonal())], 0.1))  # type: ignore[arg-type]
    assert (same.q == alone.q).float().mean() > 0.98  # float32 sums may part at ties
    monkeypatch.setattr("gemma_awq_cli.awq.round_group.PART", 5 * K)
    parts = round_compensated(*arguments, OutputFeedback([matrix], 0.1))  # type: ignore[arg-type]
    assert (parts.q == fed.q).float().mean() > 0.9


def test_outputs_count_by_their_information_whichever_matrix_it_is_in() -> None:
    matrices = [information(16), information(24, seed=3)]
    importances = OutputFeedback(matrices, 1.0).importances
    diagonal = torch.cat([matrix.diagonal() for matrix in matrices])
    assert float(importances.mean()) == pytest.approx(1)
    torch.testing.assert_close(importances * diagonal.mean(), diagonal)


def test_information_without_any_gradient_changes_nothing() -> None:
    feedback = OutputFeedback([torch.zeros(output_feedback.LEAST_ROWS * 3, output_feedback.LEAST_ROWS * 3)], 1.0)
    assert torch.equal(feedback.importances, torch.ones(feedback.outputs))
    error = torch.randn(feedback.outputs, K)
    for turn in range(feedback.turns):
        assert not feedback.wanted_error(turn, error).any()
