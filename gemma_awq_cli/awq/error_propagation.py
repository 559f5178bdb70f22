"""Weights that make up for what quantizing the layers before has done to their input.

The input that a linear will get is x', not the 16-bit model's x. The weight whose output on x' is nearest to W x in the
least squares is `W + W D H^-1` with `D = E[(x - x')^T x']` and `H = E[x'^T x']`. The whole way there is too far: much
of x - x' is noise, to which least squares answers by shrinking weights, and what later layers and norms make of it is
not in the sums. A part of the way is better than none on text of every kind.

Source: Li et al., "GPTAQ" (2504.02692), and Arai and Ichikawa, "Quantization Error Propagation" (2504.09629), whose
strength the part is.
"""

import torch
from torch import Tensor

from gemma_awq_cli.awq.gptq import lower_factor

DAMPING = 0.2  # share of the mean diagonal added to H
PART = 2**23  # elements that are corrected at a time: rows are independent


def correct(weight: Tensor, drift: Tensor, gram: Tensor, strength: float) -> None:
    """Make `weight` into `W + strength W D (H + damping)^-1`, in its place.

    weight: [N, K] float32; drift: D, gram: H, both [B, k, k] float32 with B k = K, as `InputStatistics` has them.
    """
    for part, difference, block in zip(weight.chunk(gram.shape[0], dim=1), drift, gram, strict=True):
        factor = lower_factor(block, DAMPING).to(torch.float32).to(block.device)
        for rows in part.split(max(1, PART // part.shape[1])):
            rows += strength * torch.cholesky_solve((rows @ difference).t(), factor).t()
