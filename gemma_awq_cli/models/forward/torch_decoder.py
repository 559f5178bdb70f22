"""A forward of our own in torch, over a static cache: it computes what transformers computes, with less around it.

The tokens of all rows of a batch form one flat sequence, so there is no padding that could change anything: linears see
[T, hidden], and attention sees each row's own keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemma_awq_cli.kernels.head import soft_cap
from gemma_awq_cli.models.forward.cached_session import CachedSession
from gemma_awq_cli.models.forward.kv_cache import KVCache, make_cache, slot_positions
from gemma_awq_cli.models.forward.prefill import FlatBatch, RowChunk
from gemma_awq_cli.models.gemma.architecture import Architecture

# What it implements of `models.gemma.features.FEATURES`.
FEATURES = frozenset({"post_norms", "qk_norm", "attention_softcap", "final_softcap", "sliding_window"})


@dataclass(frozen=True)
class LayerWeights:
    """One layer. qkv and gate_up have joined outputs; the norms are gains [N] float32, offset included."""

    qkv: nn.Module
    o: nn.Module
    gate_up: nn.Module
    down: nn.Module
    input_norm: Tensor
    attention_norm: Tensor | None  # after attention, before the residual is added
    mlp_norm: Tensor  # before the MLP
    post_mlp_norm: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    per_layer_norm: Tensor | None
    laurel_norm: Tensor | None
    router_norm: Tensor | None
    dense_norm: Tensor | None
    experts_norm: Tensor | None
    post_experts_norm: Tensor | None


@dataclass(frozen=True)
class TextWeights:
    """embedding: [V, hidden]; embed_scale: what its rows are multiplied by, in `dtype`; norm: the final gain [hidden]
    float32; head: hidden -> logits.
    """

    arch: Architecture
    embedding: Tensor
    embed_scale: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: nn.Module
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device


class DecoderSession(CachedSession):
    """A `Session` over `TextWeights` on any device, with a cache of its own unless it gets one."""

    def __init__(self, weights: TextWeights, rows: int, capacity: int, cache: KVCache | None = None) -> None:
        arch = weights.arch
        cache = cache or make_cache(arch.layouts, rows, capacity, weights.device, weights.dtype)
        super().__init__(cache, arch.vocabulary)
        self._weights = weights
        self._frequencies = [rope.inv_freq.to(weights.device) for rope in arch.ropes]

    @torch.inference_mode()
    def next_logits(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """See `Session.next_logits`."""
        return super().next_logits(tokens)

    def _logits(self, parts: list[Tensor]) -> Tensor:
        """Final states [R, hidden] -> [R, V] float32."""
        arch = self._weights.arch
        normed = rms_norm(torch.cat(parts), self._weights.norm, arch.eps)
        return soft_cap(self._weights.head(normed).to(torch.float32), arch.final_softcap)

    def _read(self, batch: FlatBatch) -> Tensor:
        """The last layer's output [R, hidden] of the wanted tokens."""
        states = self._forward(torch.tensor(batch.ids, device=self._weights.device), batch.chunks)
        sizes = [chunk.count for chunk in batch.chunks]
        parts = zip(states.split(sizes), sizes, batch.wanted, strict=True)
        return torch.cat([part[size - wanted :] for part, size, wanted in parts])

    def _forward(self, ids: Tensor, chunks: Sequence[RowChunk]) -> Tensor:
        """Token ids [T] of `chunks`, one behind the other -> the last layer's output [T, hidden]."""
        arch, weights = self._weights.arch, self._weights
        x = weights.embedding[ids].to(weights.dtype) * weights.embed_scale
        positions = torch.cat([torch.arange(c.start, c.start + c.count, device=ids.device) for c in chunks])
        angles: dict[int, tuple[Tensor, Tensor]] = {}  # by rope: layers share them
        for index, layer in enumerate(weights.layers):
            rope = id(arch.ropes[index])
            if rope not in angles:
                angles[rope] = self._angles(index, positions, x.dtype)
            normed = rms_norm(x, layer.input_norm, arch.eps)
            x = x + self._normed(
                layer.o(self._attention(index, layer, normed, chunks, angles[rope])), layer.attention_norm
            )
            gate_up = layer.gate_up(rms_norm(x, layer.mlp_norm, arch.eps))
            gate, up = gate_up.split(arch.layouts[index].intermediate, -1)
            x = x + self._normed(layer.down(F.gelu(gate, approximate="tanh") * up), layer.post_mlp_norm)
        return x

    def _angles(self, index: int, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The cosines and sines [T, 1, head_dim / 2] of a layer's rotary embedding."""
        freqs = positions[:, None].to(torch.float32) * self._frequencies[index]
        factor = self._weights.arch.ropes[index].factor
        return (freqs.cos() * factor).to(dtype)[:, None], (freqs.sin() * factor).to(dtype)[:, None]

    def _normed(self, x: Tensor, gain: Tensor | None) -> Tensor:
        """x behind a norm that the family may not have."""
        return x if gain is None else rms_norm(x, gain, self._weights.arch.eps)

    def _attention(
        self, index: int, layer: LayerWeights, x: Tensor, chunks: Sequence[RowChunk], angles: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Normed states [T, hidden] -> the attention's output [T, heads * head_dim], before o_proj."""
        arch, layout = self._weights.arch, self._weights.arch.layouts[index]
        q, k, v = layer.qkv(x).split((layout.query_size, layout.kv_size, layout.kv_size), -1)
        q, k, v = (part.unflatten(-1, (-1, layout.head_dim)) for part in (q, k, v))
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = rms_norm(q, layer.q_norm, arch.eps), rms_norm(k, layer.k_norm, arch.eps)
        q, k = rotate(q, *angles), rotate(k, *angles)
        sizes = [chunk.count for chunk in chunks]
        if len(set(sizes)) == 1:  # rows of equally many tokens are one batch
            return self._attend(index, q, k, v, chunks)
        parts = zip(q.split(sizes), k.split(sizes), v.split(sizes), chunks, strict=True)
        return torch.cat([self._attend(index, q_, k_, v_, [chunk]) for q_, k_, v_, chunk in parts])

    def _attend(self, index: int, q: Tensor, k: Tensor, v: Tensor, chunks: Sequence[RowChunk]) -> Tensor:
        """q [T, heads, D], k, v [T, kv_heads, D] of chunks of equally many tokens -> [T, heads * D]."""
        arch, layout = self._weights.arch, self._weights.arch.layouts[index]
        keys, values = self._cache.keys[index], self._cache.values[index]
        count, slots = chunks[0].count, keys.shape[2]
        rows = torch.tensor([chunk.row for chunk in chunks], device=q.device)
        starts = torch.tensor([chunk.start for chunk in chunks], device=q.device)
        q, k, v = (t.view(len(chunks), count, -1, layout.head_dim).transpose(1, 2) for t in (q, k, v))  # [B, H, C, D]
        asking = starts[:, None] + torch.arange(count, device=q.device)  # [B, C]
        end = max(chunk.start for chunk in chunks) + count
        if count == 1 or end <= slots:  # nothing that a query still needs is overwritten
            self._write(index, rows, asking, k, v)
            held = slice(0, min(end, slots))
            all_k, all_v = keys[rows, :, held], values[rows, :, held]
            at = slot_positions(starts + count, slots)[:, held]
        else:
            held = slice(0, min(end - count, slots))
            all_k, all_v = torch.cat([keys[rows, :, held], k], 2), torch.cat([values[rows, :, held], v], 2)
            at = torch.cat([slot_positions(starts, slots)[:, held], asking], 1)
            kept = slice(max(0, count - slots), count)
            self._write(index, rows, asking[:, kept], k[:, :, kept], v[:, :, kept])
        visible = (at[:, None] >= 0) & (at[:, None] <= asking[:, :, None])  # [B, C, keys]
        if layout.window is not None:
            visible &= at[:, None] > asking[:, :, None] - layout.window
        attended = attention(q, all_k, all_v, visible[:, None], arch.query_scale, arch.attention_softcap)
        return attended.transpose(1, 2).reshape(len(chunks) * count, -1)

    def _write(self, index: int, rows: Tensor, at: Tensor, k: Tensor, v: Tensor) -> None:
        """Write k, v [B, kv_heads, C, D] at positions [B, C] of the cache's rows [B]."""
        keys, values = self._cache.keys[index], self._cache.values[index]
        slot = at % keys.shape[2]
        keys[rows[:, None], :, slot] = k.transpose(1, 2)
        values[rows[:, None], :, slot] = v.transpose(1, 2)


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """RMSNorm, computed in float32. x: [..., N]; gain: [N] float32."""
    wide = x.to(torch.float32)
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * gain).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary embedding of x [T, heads, D]. cos, sin: [T, 1, D/2]."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Attention over grouped heads.

    q: [B, heads, C, D]; k, v: [B, kv_heads, S, D]; visible: [B, 1, C, S] bool, which keys a query sees. Returns
    [B, heads, C, D].
    """
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, visible, scale=scale, enable_gqa=True)
    grouped = q.unflatten(1, (k.shape[1], -1))  # [B, kv_heads, heads per kv head, C, D]
    scores = soft_cap(grouped @ k[:, :, None].transpose(-1, -2) * scale, softcap)
    scores = scores.masked_fill(~visible[:, :, None], float("-inf"))
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
    return (weights @ v[:, :, None]).flatten(1, 2)
