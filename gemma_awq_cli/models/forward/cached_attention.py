"""Attention of new tokens over the cache: what it holds, what they write to it, and what each of them sees."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_awq_cli.kernels.dense_products import matmul, scaled_dot_product_attention
from gemma_awq_cli.kernels.head import soft_cap
from gemma_awq_cli.kernels.plain_ops import slot_positions
from gemma_awq_cli.models.forward.kv_cache import KVCache
from gemma_awq_cli.models.forward.prefill import FlatBatch, RowChunk
from gemma_awq_cli.system.arrays import as_tensor


@dataclass(frozen=True)
class ChunkGroup:
    """Chunks of a flat batch, one behind the other, that are one tensor because they have equally many tokens.

    rows: [B], of the cache; positions: [B, C], of the tokens; end: after the last of them; wanted: after how many of
    the last tokens of each chunk logits are wanted.
    """

    rows: Tensor
    positions: Tensor
    end: int
    wanted: int

    @property
    def queries(self) -> Tensor:
        """The positions [B, wanted] of the tokens after which logits are wanted."""
        return self.positions[:, self.positions.shape[1] - self.wanted :]


def chunk_groups(batch: FlatBatch, equally_wanted: bool, device: torch.device) -> tuple[ChunkGroup, ...]:
    """All chunks in one group if they have equally many tokens, or else each alone.

    equally_wanted: whether the chunks of a group must also have equally many tokens after which logits are wanted.
    """
    parts = list(zip(batch.chunks, batch.wanted, strict=True))
    sizes = {(chunk.count, wanted if equally_wanted else 0) for chunk, wanted in parts}
    groups = [parts] if len(sizes) == 1 else [[part] for part in parts]
    return tuple(_group([chunk for chunk, _ in group], group[0][1], device) for group in groups)


def _group(chunks: Sequence[RowChunk], wanted: int, device: torch.device) -> ChunkGroup:
    rows = torch.tensor([chunk.row for chunk in chunks], device=device)
    starts = torch.tensor([chunk.start for chunk in chunks], device=device)
    count = chunks[0].count
    positions = starts[:, None] + torch.arange(count, device=device)
    return ChunkGroup(rows, positions, max(chunk.start for chunk in chunks) + count, wanted)


@dataclass(frozen=True)
class CacheTensors:
    """The tensors of a `KVCache`'s memory, by layer."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


def cache_tensors(cache: KVCache) -> CacheTensors:
    """The same cache as the torch decoder reads and writes it."""
    return CacheTensors(tuple(map(as_tensor, cache.keys)), tuple(map(as_tensor, cache.values)))


@dataclass(frozen=True)
class Held:
    """What the queries of a group may see.

    keys, values: [B, kv_heads, S, D]; at: their positions [B, S], negative where there is nothing.
    """

    keys: Tensor
    values: Tensor
    at: Tensor


def extend(cache: CacheTensors, index: int, group: ChunkGroup, k: Tensor, v: Tensor) -> Held:
    """Write k, v [B * C, kv_heads, D] of a group to layer `index`'s cache. What its tokens, and the older ones that
    they may still need, are together.
    """
    keys, values, rows, at = cache.keys[index], cache.values[index], group.rows, group.positions
    (chunks, count), slots = at.shape, keys.shape[2]
    k, v = (part.view(chunks, count, -1, part.shape[-1]).transpose(1, 2) for part in (k, v))
    starts = at[:, 0]
    if count == 1 or group.end <= slots:  # nothing that a query still needs is overwritten
        _write(keys, values, rows, at % slots, k, v)
        held = slice(0, min(group.end, slots))
        return Held(keys[rows, :, held], values[rows, :, held], slot_positions(starts + count, slots)[:, held])
    held = slice(0, min(group.end - count, slots))
    older = slot_positions(starts, slots)[:, held]
    seen = Held(
        torch.cat([keys[rows, :, held], k], 2), torch.cat([values[rows, :, held], v], 2), torch.cat([older, at], 1)
    )
    kept = slice(max(0, count - slots), count)
    _write(keys, values, rows, at[:, kept] % slots, k[:, :, kept], v[:, :, kept])
    return seen


def _write(keys: Tensor, values: Tensor, rows: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """Write k, v [B, kv_heads, C, D] to slots [B, C] of the cache's rows [B]."""
    keys[rows[:, None], :, slots] = k.transpose(1, 2)
    values[rows[:, None], :, slots] = v.transpose(1, 2)


def attend(q: Tensor, held: Held, positions: Tensor, window: int | None, scale: float, softcap: float | None) -> Tensor:
    """Queries [B * Q, heads, D] at positions [B, Q] -> the heads' outputs side by side [B * Q, heads * D]."""
    q = q.view(*positions.shape, *q.shape[1:]).transpose(1, 2)  # [B, heads, Q, D]
    visible = (held.at[:, None] >= 0) & (held.at[:, None] <= positions[:, :, None])  # [B, Q, S]
    if window is not None:
        visible &= held.at[:, None] > positions[:, :, None] - window
    attended = attention(q, held.keys, held.values, visible[:, None], scale, softcap)
    return attended.transpose(1, 2).flatten(0, 1).flatten(1)


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Attention over grouped heads.

    q: [B, heads, C, D]; k, v: [B, kv_heads, S, D]; visible: [B, 1, C, S] bool, which keys a query sees. Returns
    [B, heads, C, D].
    """
    if softcap is None:
        return scaled_dot_product_attention(q, k, v, visible, scale)
    grouped = q.unflatten(1, (k.shape[1], -1))  # [B, kv_heads, heads per kv head, C, D]
    scores = soft_cap(matmul(grouped, k[:, :, None].transpose(-1, -2)) * scale, softcap)
    scores = scores.masked_fill(~visible[:, :, None], float("-inf"))
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
    return matmul(weights, v[:, :, None]).flatten(1, 2)
