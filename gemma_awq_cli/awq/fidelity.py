"""How far a quantized model's predictions are from the 16-bit model's, from the logits of both."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Fidelity:
    """Running sums over predicted positions; the properties are per-token means (KL in nats)."""

    tokens: int = 0
    nll_reference: float = 0.0
    nll_quantized: float = 0.0
    kl_sum: float = 0.0
    agreements: int = 0

    def add(self, reference: Tensor, quantized: Tensor, targets: Tensor) -> None:
        """Logits [R, V] of both models at R positions (any float dtype) and the token that follows each, [R]."""
        log_p = torch.log_softmax(reference.to(torch.float32), -1)
        log_q = torch.log_softmax(quantized.to(torch.float32), -1)
        index = targets[:, None]
        self.tokens += targets.numel()
        self.nll_reference -= float(log_p.gather(1, index).sum(dtype=torch.float64))
        self.nll_quantized -= float(log_q.gather(1, index).sum(dtype=torch.float64))
        self.agreements += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        # KL(reference || quantized) a row, as log_q is no longer needed
        self.kl_sum += float((log_p.exp() * log_q.neg_().add_(log_p)).sum(-1).sum(dtype=torch.float64))

    @property
    def kl(self) -> float:
        return self.kl_sum / self.tokens

    @property
    def perplexity_reference(self) -> float:
        return math.exp(self.nll_reference / self.tokens)

    @property
    def perplexity_quantized(self) -> float:
        return math.exp(self.nll_quantized / self.tokens)

    @property
    def top1_agreement(self) -> float:
        return self.agreements / self.tokens
