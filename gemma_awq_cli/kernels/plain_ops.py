"""What a layer computes between its products, in plain torch: for every forward, and as what fused kernels equal."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_awq_cli.kernels.head import soft_cap


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


def slot_positions(ends: Tensor, slots: int) -> Tensor:
    """The position that each slot of a ring holds after positions 0 .. ends - 1 were written: [B] -> [B, slots].

    Negative where nothing was written yet.
    """
    last = ends[:, None] - 1
    return last - (last - torch.arange(slots, device=ends.device)) % slots


def seen_slots(positions: Tensor, slots: int, window: int | None) -> Tensor:
    """Which slots of a ring tokens at positions [T] see that are in it themselves: [T, slots] bool."""
    held = slot_positions(positions + 1, slots)
    seen = held >= 0
    return seen if window is None else seen & (held > positions[:, None] - window)


def attend_seen(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, softcap: float | None) -> Tensor:
    """One query per row and head: q [T, heads, D], k, v [T, kv_heads, S, D], visible [T, 1, 1, S] -> [T, heads * D].

    The heads that share keys are the queries of one attention over these: keys and values are read once for them all.
    """
    grouped = q.unflatten(1, (k.shape[1], -1))  # [T, kv_heads, heads per kv head, D]
    if softcap is None:
        mask = visible.expand(-1, -1, grouped.shape[2], -1)
        return F.scaled_dot_product_attention(grouped, k, v, mask, scale=scale).flatten(1)
    scores = soft_cap(grouped @ k.transpose(-1, -2) * scale, softcap).masked_fill(~visible, float("-inf"))
    return (torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ v).flatten(1)


def attend_once(
    q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, slots: int, window: int, scale: float, softcap: float
) -> Tensor:
    """`attend_seen` of tokens at positions [T] that are in the ring themselves.

    keys, values: [T, kv_heads, S, D], the first S slots of a ring of `slots`; window, softcap: 0: none.
    """
    visible = seen_slots(positions, slots, window or None)[:, None, None, : keys.shape[2]]
    return attend_seen(q, keys, values, visible, scale, softcap or None)
