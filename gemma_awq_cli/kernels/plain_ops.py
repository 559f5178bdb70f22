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


def split_qkv(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    kv_heads: int,
    head_dim: int,
    keys_are_values: bool,
    value_norm: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The queries [T, heads, D], keys and values [T, kv_heads, D], normed and rotated as attention has them.

    qkv: [T, outputs], the queries, then the keys, then the values unless they are the keys as they come. kv_heads: 0
    if there are queries only. The norms are gains [D] float32.
    """
    parts = qkv.unflatten(-1, (-1, head_dim))
    q, own = parts[:, :heads], parts[:, heads:]
    k = own[:, :kv_heads]
    v = k if keys_are_values else own[:, kv_heads:]
    q = q if q_norm is None else rms_norm(q, q_norm, eps)
    if kv_heads:
        v = rms_norm(v, None, eps) if value_norm else v
        k = rotate(k if k_norm is None else rms_norm(k, k_norm, eps), cos, sin)
    return rotate(q, cos, sin), k, v


def place(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    at: Tensor,
    heads: int,
    kv_heads: int,
    keys_are_values: bool,
    value_norm: bool,
    eps: float,
) -> Tensor:
    """The queries of `split_qkv`; keys and values go to slots `at` [T] of the first T rows of the cache.

    keys, values: [R, kv_heads, slots, D].
    """
    head_dim = keys.shape[-1]
    q, k, v = split_qkv(qkv, q_norm, k_norm, cos, sin, heads, kv_heads, head_dim, keys_are_values, value_norm, eps)
    if kv_heads:
        rows = torch.arange(len(k), device=k.device)
        keys[rows, :, at] = k
        values[rows, :, at] = v
    return q
