"""Triton kernels for the attention of one query per row and head over a ring of slots: see `plain_ops.attend_once`.

The slots are split, since a few rows of a few heads would not fill a GPU: each part has a softmax of its own, and a
second kernel weighs the parts against each other in a fixed order. Imports triton.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemma_awq_cli.kernels.triton_products import IN_INTERPRETER

_SLOTS = 32  # that a program looks at together
_PROGRAMS = 256  # that fill a large GPU
_LEAST_HEADS = 16  # of a tile of tensor cores
_ENDLESS = 2**30  # a window of no bound
_LOWEST = tl.constexpr(-1e30)  # a score of a slot that is not seen: finite, so that no part is without numbers


@triton.jit
def _parts(
    q, keys, values, positions, sums, tops, totals, heads, slots, held, per_split, window, scale, softcap,
    key_row, key_head, key_slot,
    GROUP: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CAPPED: tl.constexpr,  # noqa: N803
    WIDE: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """One part of the slots, for the `GROUP` heads of one row that share keys: padded to `HEADS`.

    sums [T, splits, heads, WIDTH], tops, totals [T, splits, heads] float32: of the part's softmax.
    """
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    own = tl.arange(0, HEADS)
    channel = tl.arange(0, WIDTH)
    last = tl.load(positions + row).to(tl.int32)
    head = kv_head * GROUP + own
    query = tl.load(q + (row * heads + head[:, None]) * WIDTH + channel[None, :], mask=own[:, None] < GROUP, other=0.0)
    top = tl.full((HEADS,), _LOWEST, tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    mixed = tl.zeros((HEADS, WIDTH), tl.float32)
    base = row * key_row + kv_head * key_head
    for step in range(per_split):
        slot = (split * per_split + step) * BLOCK + tl.arange(0, BLOCK)
        behind = last - slot
        behind = tl.where(behind >= 0, behind % slots, behind + slots)
        at = last - behind  # the position that the slot holds; negative: nothing yet
        seen = (slot < held) & (at >= 0) & (behind < window)
        place = base + slot[:, None] * key_slot + channel[None, :]
        key = tl.load(keys + place, mask=seen[:, None], other=0.0)
        value = tl.load(values + place, mask=seen[:, None], other=0.0)
        if WIDE:
            scores = tl.dot(query.to(tl.float32), tl.trans(key.to(tl.float32)), input_precision="ieee") * scale
        else:
            scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        if CAPPED:
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
        scores = tl.where(seen[None, :], scores, _LOWEST)
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.where(seen[None, :], tl.exp(scores - higher[:, None]), 0.0)
        faded = tl.exp(top - higher)
        if WIDE:
            part = tl.dot(weights, value.to(tl.float32), input_precision="ieee")
        else:
            part = tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        mixed = mixed * faded[:, None] + part
        total = total * faded + tl.sum(weights, 1)
        top = higher
    where = (row * tl.num_programs(2) + split) * heads + head
    tl.store(tops + where, top, mask=own < GROUP)
    tl.store(totals + where, total, mask=own < GROUP)
    tl.store(sums + where[:, None] * WIDTH + channel[None, :], mixed, mask=own[:, None] < GROUP)


@triton.jit
def _joined(sums, tops, totals, out, heads, splits, WIDTH: tl.constexpr):  # noqa: N803
    """One head of one row: its parts, the first one first."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    channel = tl.arange(0, WIDTH)
    first = row * splits * heads + head
    top = tl.load(tops + first)
    for split in range(1, splits):
        top = tl.maximum(top, tl.load(tops + first + split * heads))
    total = 0.0
    mixed = tl.zeros((WIDTH,), tl.float32)
    for split in range(splits):
        where = first + split * heads
        weight = tl.exp(tl.load(tops + where) - top)
        total += weight * tl.load(totals + where)
        mixed += weight * tl.load(sums + where * WIDTH + channel)
    tl.store(out + (row * heads + head) * WIDTH + channel, (mixed / total).to(out.dtype.element_ty))


def attend_once(
    q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, slots: int, window: int, scale: float, softcap: float
) -> Tensor:
    """See `plain_ops.attend_once`. D: one of `step_ops.HEAD_SIZES`."""
    (rows, heads, width), kv_heads, held = q.shape, keys.shape[1], keys.shape[2]
    assert keys.stride() == values.stride()
    splits, per_split = splits_of(rows * kv_heads, held)
    sums = torch.empty(rows, splits, heads, width, dtype=torch.float32, device=q.device)
    tops, totals = (sums.new_empty(rows, splits, heads) for _ in range(2))
    out = torch.empty(rows, heads * width, dtype=q.dtype, device=q.device)
    group = heads // kv_heads
    _parts[(rows, kv_heads, splits)](
        q.contiguous(), keys, values, positions, sums, tops, totals, heads, slots, held, per_split,
        window or _ENDLESS, scale, softcap, keys.stride(0), keys.stride(1), keys.stride(2), GROUP=group,
        HEADS=max(_LEAST_HEADS, triton.next_power_of_2(group)), WIDTH=width, BLOCK=_SLOTS, CAPPED=softcap > 0,
        WIDE=IN_INTERPRETER,
    )  # fmt: skip
    _joined[(rows, heads)](sums, tops, totals, out, heads, splits, WIDTH=width)
    return out


def splits_of(programs: int, held: int) -> tuple[int, int]:
    """Into how many parts `held` slots are split for so many rows and heads, and the blocks of slots of each part."""
    blocks = -(-held // _SLOTS)
    per_split = -(-blocks // min(blocks, max(1, _PROGRAMS // programs)))
    return -(-blocks // per_split), per_split
