"""A forward of our own for Gemma 1, 2 and 3 over a static cache: what transformers computes, with less around it.

Tokens of all rows lie behind one another in one flat batch, so that there is no padding which could change anything:
linears see [T, hidden], and attention sees each row's own keys. Long prompts pass in chunks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemma_awq_cli.models.forward.kv_cache import KVCache, make_cache, slot_positions
from gemma_awq_cli.models.gemma.architecture import Architecture

CHUNK = 512  # tokens that pass the layers at once: what bounds the memory of a long prompt


@dataclass(frozen=True)
class LayerWeights:
    """One layer. qkv and gate_up may be one linear of joined outputs; norms are gains [N] float32, offset included."""

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


@dataclass(frozen=True)
class TextWeights:
    """embedding: [V, hidden]; head: hidden -> logits; norm: the final gain [hidden] float32."""

    arch: Architecture
    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: nn.Module
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device


@dataclass(frozen=True)
class Piece:
    """Tokens of one row that pass the layers together: positions start .. start + count - 1."""

    row: int
    start: int
    count: int


class DecoderSession:
    """A `Session` over `TextWeights` on any device, with a cache of its own unless one is given."""

    independent_rows = True

    def __init__(self, weights: TextWeights, rows: int, capacity: int, cache: KVCache | None = None) -> None:
        self._weights = weights
        self._cache = cache or make_cache(weights.arch, rows, capacity, weights.device, weights.dtype)
        self._tables = [(rope.inv_freq.to(weights.device), rope.factor) for rope in weights.arch.ropes]

    @torch.inference_mode()
    def next_logits(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """See `Session.next_logits`."""
        return self.last_logits(tokens, [1] * len(tokens))

    def repeat_row(self, rows: int) -> None:
        """See `Session.expand`."""
        self._cache = self._cache.repeated(rows)

    def last_logits(self, tokens: Sequence[Sequence[int]], counts: Sequence[int]) -> Tensor:
        """See `Session.last_logits`."""
        self._cache.require_room(tokens, self._weights.arch.vocabulary)
        ends = [length + len(new) for length, new in zip(self._cache.lengths, tokens, strict=True)]
        last = []
        for pieces in chunks(tokens, self._cache.lengths):
            ids = [token for p in pieces for token in tokens_of(tokens[p.row], p, self._cache.lengths[p.row])]
            states = self._forward(torch.tensor(ids, device=self._weights.device), pieces)
            end = 0
            for piece in pieces:
                end += piece.count
                last.append(states[end - wanted_of(piece, ends[piece.row], counts[piece.row]) : end])
        self._cache.lengths[:] = ends
        return self._logits(torch.cat(last))

    def reset_row(self, row: int) -> None:
        """See `Session.clear`."""
        self._cache.lengths[row] = 0

    def _logits(self, states: Tensor) -> Tensor:
        """Final states [R, hidden] -> [R, V] float32."""
        arch = self._weights.arch
        logits: Tensor = self._weights.head(_norm(states, self._weights.norm, arch.eps)).to(torch.float32)
        if arch.final_softcap is not None:
            logits = logits.div_(arch.final_softcap).tanh_().mul_(arch.final_softcap)
        return logits

    def _forward(self, ids: Tensor, pieces: Sequence[Piece]) -> Tensor:
        """Token ids [T] of `pieces`, one behind the other -> the last layer's output [T, hidden]."""
        arch, weights = self._weights.arch, self._weights
        scale = torch.tensor(arch.embed_scale, dtype=weights.dtype, device=ids.device)
        x = weights.embedding[ids].to(weights.dtype) * scale
        positions = torch.cat([torch.arange(p.start, p.start + p.count, device=ids.device) for p in pieces])
        angles: dict[int, tuple[Tensor, Tensor]] = {}
        for index, layer in enumerate(weights.layers):
            rope = arch.ropes[index]
            if id(rope) not in angles:
                inv_freq, factor = self._tables[index]
                freqs = positions[:, None].to(torch.float32) * inv_freq
                angles[id(rope)] = tuple((f * factor).to(x.dtype)[:, None] for f in (freqs.cos(), freqs.sin()))  # type: ignore[assignment]
            mixed = layer.o(
                self._attention(index, layer, _norm(x, layer.input_norm, arch.eps), pieces, angles[id(rope)])
            )
            if layer.attention_norm is not None:
                mixed = _norm(mixed, layer.attention_norm, arch.eps)
            x = x + mixed
            gate, up = layer.gate_up(_norm(x, layer.mlp_norm, arch.eps)).split(arch.intermediate, -1)
            mixed = layer.down(F.gelu(gate, approximate="tanh") * up)
            if layer.post_mlp_norm is not None:
                mixed = _norm(mixed, layer.post_mlp_norm, arch.eps)
            x = x + mixed
        return x

    def _attention(
        self, index: int, layer: LayerWeights, x: Tensor, pieces: Sequence[Piece], angles: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Normed states [T, hidden] -> what the heads gathered [T, heads * head_dim]."""
        arch = self._weights.arch
        q, k, v = layer.qkv(x).split((arch.query_size, arch.kv_size, arch.kv_size), -1)
        q, k, v = (
            q.unflatten(-1, (arch.heads, -1)),
            k.unflatten(-1, (arch.kv_heads, -1)),
            v.unflatten(-1, (arch.kv_heads, -1)),
        )
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = _norm(q, layer.q_norm, arch.eps), _norm(k, layer.k_norm, arch.eps)
        q, k = _rotate(q, *angles), _rotate(k, *angles)
        counts = {piece.count for piece in pieces}
        if len(counts) == 1:  # rows of equally many tokens are one batch
            return self._attend(index, q, k, v, pieces)
        sizes = [piece.count for piece in pieces]
        parts = zip(q.split(sizes), k.split(sizes), v.split(sizes), pieces, strict=True)
        return torch.cat([self._attend(index, q_, k_, v_, [piece]) for q_, k_, v_, piece in parts])

    def _attend(self, index: int, q: Tensor, k: Tensor, v: Tensor, pieces: Sequence[Piece]) -> Tensor:
        """q [T, heads, D], k, v [T, kv_heads, D] of rows of equally many tokens -> [T, heads * D]."""
        arch, window = self._weights.arch, self._weights.arch.windows[index]
        keys, values = self._cache.keys[index], self._cache.values[index]
        count, slots = pieces[0].count, keys.shape[2]
        rows = torch.tensor([piece.row for piece in pieces], device=q.device)
        starts = torch.tensor([piece.start for piece in pieces], device=q.device)
        q, k, v = (t.view(len(pieces), count, -1, arch.head_dim).transpose(1, 2) for t in (q, k, v))  # [B, H, C, D]
        asking = starts[:, None] + torch.arange(count, device=q.device)  # [B, C]
        end = max(piece.start for piece in pieces) + count
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
        seen = (at[:, None] >= 0) & (at[:, None] <= asking[:, :, None])  # [B, C, keys]
        if window is not None:
            seen &= at[:, None] > asking[:, :, None] - window
        gathered = _gather(q, all_k, all_v, seen[:, None], arch)
        return gathered.transpose(1, 2).reshape(len(pieces) * count, -1)

    def _write(self, index: int, rows: Tensor, at: Tensor, k: Tensor, v: Tensor) -> None:
        """k, v [B, kv_heads, C, D] at positions [B, C] of cache rows [B]."""
        keys, values = self._cache.keys[index], self._cache.values[index]
        slot = at % keys.shape[2]
        keys[rows[:, None], :, slot] = k.transpose(1, 2)
        values[rows[:, None], :, slot] = v.transpose(1, 2)


def chunks(tokens: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[list[Piece]]:
    """New tokens of rows that hold `lengths` already, cut so that at most CHUNK tokens pass the layers at once.

    Every row's pieces come in order; rows of one token each stay together whatever their number.
    """
    result: list[list[Piece]] = [[]]
    room = max(CHUNK, len(tokens))
    for row, new in enumerate(tokens):
        done = 0
        while done < len(new):
            if room == 0:
                result.append([])
                room = CHUNK
            count = min(room, len(new) - done)
            result[-1].append(Piece(row, lengths[row] + done, count))
            done += count
            room -= count
    return result


def tokens_of(new: Sequence[int], piece: Piece, length: int) -> Sequence[int]:
    first = piece.start - length
    return new[first : first + piece.count]


def wanted_of(piece: Piece, end: int, count: int) -> int:
    """How many of a piece's last tokens are among the row's last `count`; end: the row's length after its last one."""
    return max(0, min(piece.count, piece.start + piece.count - (end - count)))


def _norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """RMSNorm in float32. x: [..., N]; gain: [N] float32."""
    wide = x.to(torch.float32)
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * gain).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary embedding. x: [T, heads, D]; cos, sin: [T, 1, D/2]."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _gather(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, arch: Architecture) -> Tensor:
    """Attention. q: [B, heads, C, D]; k, v: [B, kv_heads, S, D]; seen: [B, 1, C, S] bool -> [B, heads, C, D]."""
    if arch.attention_softcap is None:
        return F.scaled_dot_product_attention(q, k, v, seen, scale=arch.query_scale, enable_gqa=True)
    grouped = q.unflatten(1, (arch.kv_heads, -1))  # [B, kv_heads, heads a kv head, C, D]
    scores = grouped @ k[:, :, None].transpose(-1, -2) * arch.query_scale
    scores = torch.tanh(scores / arch.attention_softcap) * arch.attention_softcap
    scores = scores.masked_fill(~seen[:, :, None], float("-inf"))
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
    return (weights @ v[:, :, None]).flatten(1, 2)
