"""Triton kernels for what a decode step computes between its products: see `step_ops`. Imports triton.

Each computes in float32 and rounds where `plain_ops` rounds, but for the rotary embedding, which is rounded once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_GATED = 1024  # channels of a program


@triton.jit
def _rms(x, gain, size, eps):
    """x over its root mean square, times the gain. What lies beyond `size` is 0 in both."""
    return x * tl.rsqrt(tl.sum(x * x, 0) / size + eps) * gain


@triton.jit
def _norm(x, gain, out, size, eps, BLOCK: tl.constexpr):  # noqa: N803
    at = tl.arange(0, BLOCK)
    row = tl.program_id(0) * size
    state = tl.load(x + row + at, mask=at < size, other=0.0).to(tl.float32)
    normed = _rms(state, tl.load(gain + at, mask=at < size, other=0.0), size, eps)
    tl.store(out + row + at, normed.to(out.dtype.element_ty), mask=at < size)


@triton.jit
def _add(
    x, change, post, gain, total, out, size, eps,
    HAS_POST: tl.constexpr, HAS_NEXT: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    at = tl.arange(0, BLOCK)
    row = tl.program_id(0) * size
    added = tl.load(change + row + at, mask=at < size, other=0.0).to(tl.float32)
    if HAS_POST:
        added = _rms(added, tl.load(post + at, mask=at < size, other=0.0), size, eps)
        added = added.to(total.dtype.element_ty).to(tl.float32)
    state = tl.load(x + row + at, mask=at < size, other=0.0).to(tl.float32) + added
    state = state.to(total.dtype.element_ty)
    tl.store(total + row + at, state, mask=at < size)
    if HAS_NEXT:
        normed = _rms(state.to(tl.float32), tl.load(gain + at, mask=at < size, other=0.0), size, eps)
        tl.store(out + row + at, normed.to(out.dtype.element_ty), mask=at < size)


@triton.jit
def _gated(gate_up, out, size, BLOCK: tl.constexpr):  # noqa: N803
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(0)
    gate = tl.load(gate_up + row * 2 * size + at, mask=at < size, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + at, mask=at < size, other=0.0).to(tl.float32)
    # 0.5 (1 + tanh y) is the logistic function of 2 y
    bent = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    bent = bent.to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * size + at, (bent * up).to(out.dtype.element_ty), mask=at < size)


@triton.jit
def _place(
    qkv, q_norm, k_norm, cos, sin, keys, values, at, queries, outputs, heads, kv_heads, eps,
    key_row, key_head, key_slot,
    HALF: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr, SAME: tl.constexpr,  # noqa: N803
    VALUE_NORM: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """One head of one row: a query's goes to `queries`, a key's and a value's into the cache."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    half = tl.arange(0, HALF)
    own = qkv + row * outputs + head * 2 * HALF + half
    first = tl.load(own).to(tl.float32)
    second = tl.load(own + HALF).to(tl.float32)
    kind = queries.dtype.element_ty
    c = tl.load(cos + row * HALF + half).to(tl.float32)
    s = tl.load(sin + row * HALF + half).to(tl.float32)
    if head < heads:
        if Q_NORM:
            root = tl.rsqrt((tl.sum(first * first, 0) + tl.sum(second * second, 0)) / (2 * HALF) + eps)
            first = (first * root * tl.load(q_norm + half)).to(kind).to(tl.float32)
            second = (second * root * tl.load(q_norm + HALF + half)).to(kind).to(tl.float32)
        place = queries + (row * heads + head) * 2 * HALF + half
        tl.store(place, (first * c - second * s).to(kind))
        tl.store(place + HALF, (second * c + first * s).to(kind))
    else:
        slot = row * key_row + (head - heads) * key_head + tl.load(at + row) * key_slot + half
        if SAME:
            value_1 = first
            value_2 = second
        else:
            value_1 = tl.load(own + kv_heads * 2 * HALF).to(tl.float32)
            value_2 = tl.load(own + kv_heads * 2 * HALF + HALF).to(tl.float32)
        if VALUE_NORM:
            root = tl.rsqrt((tl.sum(value_1 * value_1, 0) + tl.sum(value_2 * value_2, 0)) / (2 * HALF) + eps)
            value_1 = value_1 * root
            value_2 = value_2 * root
        tl.store(values + slot, value_1.to(kind))
        tl.store(values + slot + HALF, value_2.to(kind))
        if K_NORM:
            root = tl.rsqrt((tl.sum(first * first, 0) + tl.sum(second * second, 0)) / (2 * HALF) + eps)
            first = (first * root * tl.load(k_norm + half)).to(kind).to(tl.float32)
            second = (second * root * tl.load(k_norm + HALF + half)).to(kind).to(tl.float32)
        tl.store(keys + slot, (first * c - second * s).to(kind))
        tl.store(keys + slot + HALF, (second * c + first * s).to(kind))


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """See `plain_ops.rms_norm`."""
    x, size = x.contiguous(), x.shape[-1]
    out = torch.empty_like(x)
    _norm[(x.numel() // size,)](x, gain, out, size, eps, BLOCK=triton.next_power_of_2(size))
    return out


def add_normed(x: Tensor, change: Tensor, post: Tensor | None, eps: float) -> Tensor:
    """See `plain_ops.add_normed`."""
    x, change, size = x.contiguous(), change.contiguous(), x.shape[-1]
    total = torch.empty_like(x)
    _add[(x.numel() // size,)](
        x, change, x if post is None else post, x, total, total, size, eps,
        HAS_POST=post is not None, HAS_NEXT=False, BLOCK=triton.next_power_of_2(size),
    )  # fmt: skip
    return total


def add_and_norm(x: Tensor, change: Tensor, post: Tensor | None, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `plain_ops.add_and_norm`."""
    x, change, size = x.contiguous(), change.contiguous(), x.shape[-1]
    total, out = torch.empty_like(x), torch.empty_like(x)
    _add[(x.numel() // size,)](
        x, change, x if post is None else post, gain, total, out, size, eps,
        HAS_POST=post is not None, HAS_NEXT=True, BLOCK=triton.next_power_of_2(size),
    )  # fmt: skip
    return total, out


def gated(gate_up: Tensor) -> Tensor:
    """See `plain_ops.gated`."""
    gate_up, size = gate_up.contiguous(), gate_up.shape[-1] // 2
    out = torch.empty(*gate_up.shape[:-1], size, dtype=gate_up.dtype, device=gate_up.device)
    _gated[(gate_up.numel() // (2 * size), triton.cdiv(size, _GATED))](gate_up, out, size, BLOCK=_GATED)
    return out


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
    """See `plain_ops.place`."""
    qkv, (rows, outputs), head_dim = qkv.contiguous(), qkv.shape, keys.shape[-1]
    queries = torch.empty(rows, heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    assert keys.stride() == values.stride()
    _place[(rows, heads + kv_heads)](
        qkv, qkv if q_norm is None else q_norm, qkv if k_norm is None else k_norm, cos.contiguous(), sin.contiguous(),
        keys, values, at, queries, outputs, heads, kv_heads, eps, keys.stride(0), keys.stride(1), keys.stride(2),
        HALF=head_dim // 2, Q_NORM=q_norm is not None, K_NORM=k_norm is not None, SAME=keys_are_values,
        VALUE_NORM=value_norm,
    )  # fmt: skip
    return queries
