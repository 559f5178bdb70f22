"""Weights corrected for what quantizing the layers before has done to their input.

On the quantized path a linear gets x', and not x, the input of the reference path. The weight whose output on x' is
nearest to W x in the least squares is `W + W D H^-1` with `D = E[(x - x')^T x']` and `H = E[x'^T x']`. Going all of the
way is too far: much of x - x' is noise, which least squares answers by shrinking weights, and the sums do not know what
later layers and norms do to it. Going a part of the way helps on text of every kind.

Source: Li et al., "GPTAQ" (2504.02692), and Arai and Ichikawa, "Quantization Error Propagation" (2504.09629), who
introduce the strength.
"""

import torch
from torch import Tensor

from gemma_awq_cli.awq.gptq import lower_factor

DAMPING = 0.2  # share of the mean diagonal that is added to H
PART = 2**23  # elements that are corrected at a time: rows are independent


def correct(weight: Tensor, error_gram: Tensor, gram: Tensor, strength: float) -> None:
    """Turn `weight` into `W + strength W D (H + damping)^-1`, in place.

    weight: [N, K] float32; error_gram: D, gram: H, both [B, k, k] float32 with B k = K, from `InputStatistics`.
    """
    for part, difference, block in zip(weight.chunk(gram.shape[0], dim=1), error_gram, gram, strict=True):
        factor = lower_factor(block, DAMPING).to(block.device)
        for rows in part.split(max(1, PART // part.shape[1])):
            rows += strength * torch.cholesky_solve((rows @ difference).t(), factor).t()
