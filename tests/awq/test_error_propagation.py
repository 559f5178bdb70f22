"""Weights corrected for a drifted input: the whole correction is least squares, and a part of it goes as far."""

import pytest
import torch
from torch import Tensor

from gemma_awq_cli.awq import error_propagation
from gemma_awq_cli.awq.gram import InputStatistics

K, N, ROWS = 64, 24, 4000


def corrected(weight: Tensor, error_gram: Tensor, gram: Tensor, strength: float) -> Tensor:
    result = weight.clone()
    error_propagation.correct(result, error_gram, gram, strength)
    return result


def test_the_whole_correction_is_least_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    reference = torch.randn(ROWS, K)
    x = reference @ (torch.eye(K) + 0.1 * torch.randn(K, K)) + 0.1 * torch.randn(ROWS, K)
    counted, weight = torch.rand(ROWS) + 0.5, torch.randn(N, K)
    statistics = InputStatistics(K, K, torch.device("cpu"), with_reference=True)
    for part in range(0, ROWS, 1000):
        rows = slice(part, part + 1000)
        statistics.add(x[rows], counted[rows], reference[rows])
    statistics.finish()
    assert statistics.error_gram is not None
    monkeypatch.setattr(error_propagation, "DAMPING", 1e-9)
    found = corrected(weight, statistics.error_gram, statistics.gram, 1.0)
    root = counted.sqrt()[:, None].double()
    nearest = torch.linalg.lstsq(root * x.double(), root * (reference @ weight.t()).double()).solution.t()
    assert torch.allclose(found, nearest.float(), atol=2e-4)
    monkeypatch.setattr(error_propagation, "PART", 5 * K)
    part = corrected(weight, statistics.error_gram, statistics.gram, 0.25)
    assert torch.allclose(part, weight + 0.25 * (found - weight), atol=1e-5)


def test_blocks_are_corrected_alone() -> None:
    torch.manual_seed(1)
    reference, weight = torch.randn(500, K), torch.randn(N, K)
    x = reference + 0.3 * torch.randn(500, K)
    halves = InputStatistics(K, K // 2, torch.device("cpu"), with_reference=True)
    halves.add(x, reference=reference)
    halves.finish()
    assert halves.error_gram is not None
    both = corrected(weight, halves.error_gram, halves.gram, 0.5)
    for half in (slice(0, K // 2), slice(K // 2, K)):
        alone = InputStatistics(K // 2, K // 2, torch.device("cpu"), with_reference=True)
        alone.add(x[:, half], reference=reference[:, half])
        alone.finish()
        assert alone.error_gram is not None
        assert torch.allclose(both[:, half], corrected(weight[:, half], alone.error_gram, alone.gram, 0.5), atol=1e-5)


def test_an_input_that_did_not_drift_changes_nothing() -> None:
    x, weight = torch.randn(500, K), torch.randn(N, K)
    statistics = InputStatistics(K, K, torch.device("cpu"), with_reference=True)
    statistics.add(x, reference=x)
    statistics.finish()
    assert statistics.error_gram is not None
    assert torch.equal(corrected(weight, statistics.error_gram, statistics.gram, 0.25), weight)
