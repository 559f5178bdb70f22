"""PyTorch's products of 16-bit numbers, in float32 where the processor does not multiply those.

PyTorch multiplies many rows of bfloat16 numbers on such a processor (AVX2 alone, say) a sixth as fast as of float32
ones, and of float16 numbers too. Both ways add up in float32 and round each sum once.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

WORTH_WIDENING = 8  # rows; with fewer, to read 16-bit weights takes less time than to widen them
_WIDENED = 1 << 18  # numbers of a weight that are float32 at a time: what stays in the nearest caches


@cache
def multiplies_16bit(dtype: torch.dtype) -> bool:
    """Whether PyTorch's products of bfloat16 or float16 numbers on this CPU use instructions for many at once."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype != torch.float16 or bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x [..., K] times the transpose of weight [N, K], which has the same dtype: [..., N] of that dtype."""
    outputs, inputs = weight.shape
    if not _is_slow(x) or x.numel() < WORTH_WIDENING * inputs:
        return F.linear(x, weight)
    wide = x.to(torch.float32)
    made = x.new_empty(*x.shape[:-1], outputs)
    step = max(1, _WIDENED // inputs)
    for first in range(0, outputs, step):
        made[..., first : first + step] = F.linear(wide, weight[first : first + step].to(torch.float32))
    return made


def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    """PyTorch's function of that name, over grouped heads. visible: a bool mask of the keys that a query sees."""
    if not _is_slow(q) or q.shape[-2] < WORTH_WIDENING:
        return F.scaled_dot_product_attention(q, k, v, visible, scale=scale, enable_gqa=True)
    wide_q, wide_k, wide_v = (part.to(torch.float32) for part in (q, k, v))
    attended = F.scaled_dot_product_attention(wide_q, wide_k, wide_v, visible, scale=scale, enable_gqa=True)
    return attended.to(q.dtype)


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """Return `left @ right`, of one dtype."""
    if not _is_slow(left) or left.shape[-2] < WORTH_WIDENING:
        return left @ right
    return (left.to(torch.float32) @ right.to(torch.float32)).to(left.dtype)


def _is_slow(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.itemsize == 2 and not multiplies_16bit(x.dtype)
