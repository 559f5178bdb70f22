"""RMSNorm as every forward of our own computes it: in float32, with or without a gain."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    """x [..., N] over its root mean square, times the gain [N] float32 if there is one, in the dtype of x."""
    wide = x.to(torch.float32)
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (normed if gain is None else normed * gain).to(x.dtype)
