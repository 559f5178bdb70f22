"""The streamed comparison equals the textbook one on whole rows."""

import pytest
import torch

from gemma_awq_cli.fidelity.metrics import Positions, compare


def test_chunks_give_what_whole_rows_give() -> None:
    torch.manual_seed(0)
    a = torch.randn(50, 1000) * 6
    b = a + torch.randn(50, 1000)
    targets = torch.randint(0, 1000, (50,))
    log_p, log_q = a.double().log_softmax(-1), b.double().log_softmax(-1)
    result = compare(zip(a.clone().split(77, 1), b.clone().split(77, 1), strict=True), targets).summary()
    index = targets[:, None]
    assert result.tokens == 50
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert result.kl == pytest.approx(float(kl.mean()), rel=1e-5)
    assert result.kl_median == pytest.approx(float(kl.quantile(0.5)), rel=1e-4)
    assert result.kl_p99 == pytest.approx(float(kl.quantile(0.99)), rel=1e-4)
    change = log_q.gather(1, index).exp() - log_p.gather(1, index).exp()
    assert result.rms_probability_difference == pytest.approx(float(change.square().mean().sqrt()), rel=1e-4)
    assert result.perplexity_reference == pytest.approx(float(torch.exp(-log_p.gather(1, index).mean())), rel=1e-5)
    assert result.perplexity_quantized == pytest.approx(float(torch.exp(-log_q.gather(1, index).mean())), rel=1e-5)
    assert result.top1_agreement == pytest.approx(float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean()))


def test_equal_models_do_not_diverge() -> None:
    a = torch.randn(9, 300) * 10
    result = compare([(a.clone(), a.clone())], torch.zeros(9, dtype=torch.long)).summary()
    assert result.kl == pytest.approx(0.0, abs=1e-9)
    assert result.top1_agreement == 1.0


def positions(kl: list[float]) -> Positions:
    zeros = torch.zeros(len(kl))
    return Positions(torch.tensor(kl), zeros, zeros, zeros.bool())


def test_the_curve_along_a_window_covers_every_prediction_once() -> None:
    windows, length = 3, 50
    kl = torch.arange(windows * length, dtype=torch.float32)
    curve = positions(kl.tolist()).kl_along(length)
    assert [first for first, _, _ in curve] == [0, *(end for _, end, _ in curve[:-1])]
    assert curve[-1][1] == length
    means = kl.view(windows, length).mean(0)
    for first, end, mean in curve:
        assert mean == pytest.approx(float(means[first:end].mean()))
    assert positions([0.5]).kl_along(1) == [(0, 1, 0.5)]


def test_the_histogram_counts_what_lies_outside_at_its_ends() -> None:
    histogram = positions([-1e-9, 0.0, 1e-12, 0.5, 1.0, 1e6]).kl_histogram(first=-2, last=2, bins=4)
    assert (histogram.log10_first, histogram.log10_last) == (-2, 2)
    assert histogram.counts == [3, 1, 1, 1]
