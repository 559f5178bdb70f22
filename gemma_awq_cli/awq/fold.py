"""Folding the inverse of a scale into what feeds a linear, so that the 16-bit model computes what it did before.

A linear whose weight becomes `W * s` needs the input `x / s`. The `1 / s` is folded into the module before it: into a
norm's gain, into v_proj's rows, or into the rows of a linear whose output is multiplied into the input.
"""

import torch
from torch import Tensor


def fold_into_norm(weight: Tensor, scale: Tensor, gain_offset: float) -> tuple[Tensor, Tensor]:
    """Fold `1 / scale` into an RMSNorm whose gain is `gain_offset + weight`.

    weight: [K] in the dtype that is stored; scale: [K] float32 > 0. Returns the new weight, in the same dtype, and the
    scale that the linears must get. The weight is rounded first and the scale follows from it: next to -1 a bfloat16
    weight moves in steps of 0.4 %, and a scale that ignored this would be folded inexactly. A channel keeps its weight
    and gets the scale 1 if its wanted scale is 1, if its gain is 0, or if its stored gain would become 0, change its
    sign or overflow.
    """
    gain = gain_offset + weight.to(torch.float32)
    folded = (gain / scale - gain_offset).to(weight.dtype)
    folded_gain = gain_offset + folded.to(torch.float32)
    exact = gain / folded_gain
    usable = (gain * folded_gain > 0) & torch.isfinite(exact) & torch.isfinite(folded_gain) & (scale != 1)
    return torch.where(usable, folded, weight), torch.where(usable, exact, torch.ones_like(exact))


def tie_heads(statistic: Tensor, kv_heads: int, head_dim: int) -> Tensor:
    """Return the mean over the query heads that share a kv head: [heads * head_dim] -> [kv_heads * head_dim].

    o_proj's columns are in the order of the Hugging Face layout: (kv * repeats + r) * head_dim + d.
    """
    return statistic.view(kv_heads, -1, head_dim).mean(1).flatten()


def repeat_heads(scale: Tensor, heads: int, head_dim: int) -> Tensor:
    """Repeat the scale of each kv-head channel for its query heads: [kv_heads * head_dim] -> [heads * head_dim]."""
    kv_heads = scale.numel() // head_dim
    return scale.view(kv_heads, 1, head_dim).expand(kv_heads, heads // kv_heads, head_dim).flatten()
