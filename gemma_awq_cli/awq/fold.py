"""Where the inverse of a scale goes, so that the 16-bit model stays what it was.

A linear that gets `W * s` needs `x / s`. What feeds it takes up the `1 / s`: a norm's gain, v_proj's rows, or the rows
of a linear that is multiplied into the input.
"""

import torch
from torch import Tensor


def fold_into_norm(weight: Tensor, scale: Tensor, gain_offset: float) -> tuple[Tensor, Tensor]:
    """Fold `1 / scale` into an RMSNorm whose gain is `gain_offset + weight`.

    weight: [K] in the dtype that is stored; scale: [K] float32 > 0. Returns the new weight (same dtype) and the scale
    that the linears must get. The stored weight is rounded first and the scale follows from it: next to -1 a bfloat16
    weight steps by 0.4 %, and a scale that ignored this would be folded inexactly. A channel whose gain is 0, or whose
    stored gain would become 0, change its sign or overflow, keeps its weight and the scale 1; so does one
    whose wanted scale is 1.
    """
    gain = gain_offset + weight.to(torch.float32)
    folded = (gain / scale - gain_offset).to(weight.dtype)
    folded_gain = gain_offset + folded.to(torch.float32)
    exact = gain / folded_gain
    usable = (gain * folded_gain > 0) & torch.isfinite(exact) & torch.isfinite(folded_gain) & (scale != 1)
    return torch.where(usable, folded, weight), torch.where(usable, exact, torch.ones_like(exact))


def tie_heads(statistic: Tensor, kv_heads: int, head_dim: int) -> Tensor:
    """Mean over the query heads that share a kv head: [heads * head_dim] -> [kv_heads * head_dim].

    The order of o_proj's columns in the Hugging Face layout: (kv * repeats + r) * head_dim + d.
    """
    return statistic.view(kv_heads, -1, head_dim).mean(1).flatten()


def repeat_heads(scale: Tensor, heads: int, head_dim: int) -> Tensor:
    """One scale a kv-head channel, repeated for its query heads: [kv_heads * head_dim] -> [heads * head_dim]."""
    kv_heads = scale.numel() // head_dim
    return scale.view(kv_heads, 1, head_dim).expand(kv_heads, heads // kv_heads, head_dim).flatten()
