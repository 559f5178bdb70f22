"""What a layer computes between its products, in plain torch: for every forward, and as what fused kernels equal."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    """x [..., N] over its root mean square, times the gain [N] float32 if there is one, in the dtype of x."""
    wide = x.to(torch.float32)
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (normed if gain is None else normed * gain).to(x.dtype)


def add_normed(x: Tensor, change: Tensor, post: Tensor | None, eps: float) -> Tensor:
    """The residual stream x [T, N] and what is added to it [T, N], behind a norm of its own if there is one."""
    return x + (change if post is None else rms_norm(change, post, eps))


def add_and_norm(x: Tensor, change: Tensor, post: Tensor | None, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """What `add_normed` returns, and the same behind the next norm, whose gain is [N] float32."""
    x = add_normed(x, change, post, eps)
    return x, rms_norm(x, gain, eps)


def gated(gate_up: Tensor) -> Tensor:
    """gelu(gate) * up, where the gate is the first half of gate_up [T, 2 N]: [T, N]."""
    gate, up = gate_up.chunk(2, -1)
    return F.gelu(gate, approximate="tanh") * up


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary embedding of x [T, heads, D]. cos, sin: [T, 1, D/2]."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
