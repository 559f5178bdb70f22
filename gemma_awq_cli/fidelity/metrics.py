"""The maths of fidelity: how far a quantized model's predictions are from the 16-bit model's, from both logits."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

import torch
from torch import Tensor

from gemma_awq_cli.awq.precision import widest_float

CURVE_BINS = 24  # of the mean KL along a window: their widths grow by one factor


@dataclass(frozen=True)
class Histogram:
    """Bins of equal width between two decimal logarithms; values outside count in the first and the last bin."""

    log10_first: int
    log10_last: int
    counts: list[int]


@dataclass(frozen=True)
class Fidelity:
    """Summary over `tokens` predicted positions.

    kl, kl_median, kl_p99: mean, median and 99th percentile of KL(16-bit || quantized), in nats per token.
    top1_agreement: share of positions at which both models find the same token most likely.
    rms_probability_difference: root mean square of the difference between the probabilities that both models give to
    the next token of the text, 0 to 1 (llama.cpp's `RMS Delta p`).
    """

    tokens: int
    kl: float
    kl_median: float
    kl_p99: float
    perplexity_reference: float
    perplexity_quantized: float
    top1_agreement: float
    rms_probability_difference: float


@dataclass(frozen=True)
class Positions:
    """The comparison position by position; every field is a tensor [R].

    kl: in nats. log_reference, log_quantized: natural logarithms of the probabilities that the 16-bit and the quantized
    model give to the target token. agrees: whether both models find the same token most likely.
    """

    kl: Tensor
    log_reference: Tensor
    log_quantized: Tensor
    agrees: Tensor

    def summary(self) -> Fidelity:
        """Return the figures over all positions."""
        median, p99 = torch.quantile(self.kl.cpu().double(), torch.tensor([0.5, 0.99], dtype=torch.float64)).tolist()
        difference = self.log_quantized.exp() - self.log_reference.exp()
        return Fidelity(
            tokens=self.kl.numel(),
            kl=float(self.kl.mean()),
            kl_median=median,
            kl_p99=p99,
            perplexity_reference=math.exp(-float(self.log_reference.mean())),
            perplexity_quantized=math.exp(-float(self.log_quantized.mean())),
            top1_agreement=float(self.agrees.to(torch.float32).mean()),
            rms_probability_difference=float(difference.square().mean().sqrt()),
        )

    def kl_along(self, length: int) -> list[tuple[int, int, float]]:
        """Return (first, end, mean KL) of the predictions first .. end - 1 of a window, over all windows.

        length: predictions per window; the positions are those of whole windows, one after another.
        """
        means = self.kl.cpu().double().view(-1, length).mean(0)
        edges = sorted({0, *(round(length ** (step / CURVE_BINS)) for step in range(CURVE_BINS + 1))})
        return [(first, end, float(means[first:end].mean())) for first, end in pairwise(edges)]

    def kl_histogram(self, first: int = -6, last: int = 2, bins: int = 32) -> Histogram:
        """Return how many positions have a KL of which size, in `bins` bins from 10^first to 10^last nats."""
        exponents = torch.log10(self.kl.cpu().double().clamp(min=10.0**first, max=10.0**last))
        return Histogram(first, last, [int(count) for count in torch.histc(exponents, bins, first, last)])


def join(parts: Sequence[Positions]) -> Positions:
    """Return the positions of several batches as one comparison."""
    return Positions(
        *(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Positions)),
    )


def compare(chunks: Iterable[tuple[Tensor, Tensor]], targets: Tensor) -> Positions:
    """Compare two models' logits without ever holding whole rows of them.

    chunks: pairs of 16-bit and quantized logits [R, C] float32 for the same C vocabulary entries, in the order of the
    vocabulary; the logits are overwritten. targets: [R], the token that follows each position. With running maxima m
    and sums of exponentials s,
    `KL = sum_v p_v (a_v - b_v) - (lse(a) - lse(b))` for logits a and b and p = softmax(a).
    """
    rows, device = targets.numel(), targets.device
    a, b = _Running(rows, device), _Running(rows, device)
    wide = widest_float(device)
    difference = torch.zeros(rows, dtype=wide, device=device)  # sum of exp(a - m) (a - b)
    first = 0
    for chunk_a, chunk_b in chunks:
        gap = chunk_a - chunk_b
        own = targets - first
        exponentials, rescale = a.add(chunk_a, own, first)
        difference = difference * rescale + torch.linalg.vecdot(exponentials, gap).to(wide)
        b.add(chunk_b, own, first)
        first += chunk_a.shape[1]
    return Positions(
        kl=difference / a.total - (a.logsumexp() - b.logsumexp()),
        log_reference=a.target - a.logsumexp(),
        log_quantized=b.target - b.logsumexp(),
        agrees=a.best == b.best,
    )


class _Running:
    """Log-sum-exp, arg max and target logit of rows whose logits arrive in chunks."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.maximum = torch.full((rows,), -torch.inf, device=device)
        self.wide = widest_float(device)
        self.total = torch.zeros(rows, dtype=self.wide, device=device)
        self.best = torch.zeros(rows, dtype=torch.int64, device=device)
        self.target = torch.zeros(rows, dtype=self.wide, device=device)

    def add(self, logits: Tensor, target: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Add the logits [R, C] of the vocabulary entries from `first` on. target: [R], relative to `first`.

        Returns exp(logits - maximum) [R, C], computed in place of `logits`, and the factor [R] by which earlier sums of
        such terms must be rescaled.
        """
        inside = (target >= 0) & (target < logits.shape[1])
        picked = logits.gather(1, target.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
        self.target = torch.where(inside, picked.to(self.wide), self.target)
        highest = logits.amax(dim=1)
        higher = (highest > self.maximum).nonzero()[:, 0]  # few rows, soon: where the maximum is takes longer to find
        self.best[higher] = logits[higher].argmax(dim=1) + first
        maximum = torch.maximum(self.maximum, highest)
        rescale = (self.maximum - maximum).exp().to(self.wide)
        exponentials = logits.sub_(maximum[:, None]).exp_()
        self.total = self.total * rescale + exponentials.sum(1).to(self.wide)
        self.maximum = maximum
        return exponentials, rescale

    def logsumexp(self) -> Tensor:
        return self.total.log() + self.maximum.to(self.wide)
