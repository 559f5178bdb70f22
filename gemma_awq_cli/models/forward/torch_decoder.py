"""A forward of our own in torch, over a static cache: it computes what transformers computes, with less around it.

The tokens of all rows of a batch form one flat sequence, so there is no padding that could change anything: linears see
[T, hidden], and attention sees each row's own keys. Layers at the end that read other layers' keys and values see only
the tokens after which logits are wanted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemma_awq_cli.kernels.head import soft_cap
from gemma_awq_cli.models.forward.altup import (
    AltUpWeights,
    correct_streams,
    join_streams,
    laurel,
    predict_streams,
    start_streams,
)
from gemma_awq_cli.models.forward.cached_attention import (
    ChunkGroup,
    Held,
    attend,
    cache_tensors,
    chunk_groups,
    extend,
    rotate,
)
from gemma_awq_cli.models.forward.cached_session import CachedSession
from gemma_awq_cli.models.forward.experts import Experts
from gemma_awq_cli.models.forward.kv_cache import KVCache, make_cache
from gemma_awq_cli.models.forward.per_layer_embedding import PerLayerEmbedding, PerLayerGate
from gemma_awq_cli.models.forward.prefill import FlatBatch
from gemma_awq_cli.models.forward.rms_norm import rms_norm
from gemma_awq_cli.models.forward.session import Logits
from gemma_awq_cli.models.gemma.architecture import Architecture
from gemma_awq_cli.system.arrays import DTYPES, as_array, as_tensor

# What it implements of `models.gemma.features.FEATURES`.
FEATURES = frozenset({
    "post_norms", "qk_norm", "attention_softcap", "final_softcap", "sliding_window", "value_norm", "keys_are_values",
    "shared_kv", "per_layer_inputs", "layer_scalar", "altup", "sparse_gate", "experts",
})  # fmt: skip


@dataclass(frozen=True)
class LayerWeights:
    """One layer. qkv and gate_up have joined outputs; the norms are gains [N] float32, offset included.

    qkv: without k and v in a layer that reads another's, without v where the keys are the values. scalar: [1], what the
    output is multiplied by.
    """

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
    scalar: Tensor | None
    per_layer: PerLayerGate | None
    altup: AltUpWeights | None
    experts: Experts | None


@dataclass(frozen=True)
class StreamWeights:
    """What makes AltUp's further streams of the embedding, and what makes one state of all: [hidden, hidden] each."""

    starts: tuple[Tensor, ...]
    ends: tuple[Tensor, ...]


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
    per_layer: PerLayerEmbedding | None
    streams: StreamWeights | None

    @property
    def device(self) -> torch.device:
        return self.embedding.device


@dataclass(frozen=True)
class _Tokens:
    """The tokens [T] that pass the layers together, beside their states.

    groups: their chunks; queries: the positions of each group's tokens; embedded: [T, hidden]; per_layer: their rows of
    the per-layer table; angles: by rope, which layers share; held: what the tokens of each group see, by the layer
    whose keys and values these are.
    """

    groups: tuple[ChunkGroup, ...]
    queries: tuple[Tensor, ...]
    embedded: Tensor
    per_layer: Tensor | None
    held: dict[int, list[Held]]
    angles: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def only(self, kept: Tensor) -> "_Tokens":
        """Those tokens after which logits are wanted. kept: their indices."""
        queries = tuple(group.queries for group in self.groups)
        per_layer = None if self.per_layer is None else self.per_layer[kept]
        return replace(self, queries=queries, embedded=self.embedded[kept], per_layer=per_layer, angles={})


class DecoderSession(CachedSession):
    """A `Session` over `TextWeights` on the CPU, with a cache of its own unless it gets one."""

    def __init__(self, weights: TextWeights, rows: int, capacity: int, cache: KVCache | None = None) -> None:
        arch = weights.arch
        cache = cache or make_cache(arch.layouts, rows, capacity, DTYPES[str(weights.dtype).removeprefix("torch.")])
        super().__init__(cache, arch.vocabulary)
        self._weights = weights
        self._frequencies = [as_tensor(rope.inv_freq) for rope in arch.ropes]

    def _share_cache(self) -> None:
        self._cached = cache_tensors(self._cache)

    @torch.inference_mode()
    def last_logits(self, tokens: Sequence[Sequence[int]], counts: Sequence[int]) -> Logits:
        """See `Session.last_logits`."""
        return super().last_logits(tokens, counts)

    def _logits(self, parts: list[Tensor]) -> Logits:
        """Final states [R, hidden] -> [R, V] float32."""
        arch = self._weights.arch
        normed = rms_norm(torch.cat(parts), self._weights.norm, arch.eps)
        return as_array(soft_cap(self._weights.head(normed).to(torch.float32), arch.final_softcap))

    def _read(self, batch: FlatBatch) -> Tensor:
        """The last layer's output [R, hidden] of the wanted tokens."""
        arch, weights = self._weights.arch, self._weights
        x, tokens = self._embedded(batch)
        for index in range(arch.first_kv_reader):
            x = self._layer(index, x, tokens)
        kept = _wanted_indices(batch).to(x.device)
        x, tokens = x[..., kept, :], tokens.only(kept)
        for index in range(arch.first_kv_reader, arch.layers):
            x = self._layer(index, x, tokens)
        return x if weights.streams is None else join_streams(x, weights.streams.ends)

    def _embedded(self, batch: FlatBatch) -> tuple[Tensor, _Tokens]:
        """The first layer's input, [T, hidden] or AltUp's streams [S, T, hidden], and all tokens of a batch."""
        arch, weights = self._weights.arch, self._weights
        ids = torch.tensor(batch.ids, device=weights.device)
        embedded = weights.embedding[ids].to(weights.dtype) * weights.embed_scale
        groups = chunk_groups(batch, arch.first_kv_reader < arch.layers, weights.device)
        tokens = _Tokens(
            groups=groups,
            queries=tuple(group.positions for group in groups),
            embedded=embedded,
            per_layer=None if weights.per_layer is None else weights.per_layer.rows(ids),
            held={},
        )
        return embedded if weights.streams is None else start_streams(embedded, weights.streams.starts), tokens

    def _layer(self, index: int, x: Tensor, tokens: _Tokens) -> Tensor:
        """States [T, hidden], or AltUp's streams [S, T, hidden], through one layer."""
        layer = self._weights.layers[index]
        if x.shape[-2] == 0:  # no token of this batch is wanted
            return x
        if layer.altup is not None:
            return self._altup_layer(index, layer, layer.altup, x, tokens)
        x = x + self._attention(index, layer, rms_norm(x, layer.input_norm, self._weights.arch.eps), tokens)
        x = x + self._mlp(index, layer, x)
        if layer.per_layer is not None:
            x = x + layer.per_layer.output(x, self._layer_input(index, tokens))
        return x if layer.scalar is None else x * layer.scalar

    def _altup_layer(
        self, index: int, layer: LayerWeights, altup: AltUpWeights, streams: Tensor, tokens: _Tokens
    ) -> Tensor:
        predicted = predict_streams(altup, streams)
        x = predicted[altup.active]
        normed = rms_norm(x, layer.input_norm, altup.eps)
        x = (x + self._attention(index, layer, normed, tokens) + laurel(altup, normed)) / 2.0**0.5
        x = x + self._mlp(index, layer, x)
        corrected = correct_streams(altup, predicted, x)
        assert layer.per_layer is not None
        active = corrected[altup.active]
        active = active if altup.output_scale is None else active * altup.output_scale
        corrected[1:] += layer.per_layer.output(active, self._layer_input(index, tokens))
        return corrected

    def _layer_input(self, index: int, tokens: _Tokens) -> Tensor:
        """The per-layer input [T, width]."""
        embedding = self._weights.per_layer
        assert embedding is not None
        assert tokens.per_layer is not None
        return embedding.of_layer(index, tokens.embedded, tokens.per_layer)

    def _normed(self, x: Tensor, gain: Tensor | None) -> Tensor:
        """x behind a norm that the layer may not have."""
        return x if gain is None else rms_norm(x, gain, self._weights.arch.eps)

    def _mlp(self, index: int, layer: LayerWeights, x: Tensor) -> Tensor:
        """What MLP and experts add to the residual stream x [T, hidden]."""
        arch, layout = self._weights.arch, self._weights.arch.layouts[index]
        gate, up = layer.gate_up(rms_norm(x, layer.mlp_norm, arch.eps)).split(layout.intermediate, -1)
        if layout.sparsity:
            gate = sparse_gate(gate, layout.sparsity)
        output = layer.down(F.gelu(gate, approximate="tanh") * up)
        if layer.experts is not None:
            output = layer.experts.beside(output, x)
        return self._normed(output, layer.post_mlp_norm)

    def _attention(self, index: int, layer: LayerWeights, normed: Tensor, tokens: _Tokens) -> Tensor:
        """What attention adds to the residual stream. normed: the layer's normed input [T, hidden]."""
        arch, layout = self._weights.arch, self._weights.arch.layouts[index]
        angles = self._angles(index, tokens, normed.dtype)
        parts = layer.qkv(normed).unflatten(-1, (-1, layout.head_dim))  # [T, heads, head_dim]
        q, own = parts[:, : layout.heads], parts[:, layout.heads :]
        q = rotate(self._normed(q, layer.q_norm), *angles)
        if layout.kv_source is None:
            tokens.held[index] = self._extended(index, layer, own, angles, tokens)
        held = tokens.held[index if layout.kv_source is None else layout.kv_source]
        sizes = [positions.numel() for positions in tokens.queries]
        attended = [
            attend(part, seen, positions, layout.window, arch.query_scale, arch.attention_softcap)
            for part, seen, positions in zip(q.split(sizes), held, tokens.queries, strict=True)
            if len(part)
        ]
        if layout.kv_source is None and index not in arch.kv_sources:
            del tokens.held[index]
        return self._normed(layer.o(torch.cat(attended)), layer.attention_norm)

    def _extended(
        self, index: int, layer: LayerWeights, own: Tensor, angles: tuple[Tensor, Tensor], tokens: _Tokens
    ) -> list[Held]:
        """Write a layer's keys and values to the cache; what the tokens of each group see.

        own: [T, kv_heads or twice as many, head_dim], the keys, and the values behind them unless they are the keys.
        """
        arch, layout = self._weights.arch, self._weights.arch.layouts[index]
        k = own[:, : layout.kv_heads]
        v = k if layout.keys_are_values else own[:, layout.kv_heads :]
        k = rotate(self._normed(k, layer.k_norm), *angles)
        v = rms_norm(v, None, arch.eps) if layout.value_norm else v
        sizes = [group.positions.numel() for group in tokens.groups]
        parts = zip(tokens.groups, k.split(sizes), v.split(sizes), strict=True)
        return [extend(self._cached, index, group, k_, v_) for group, k_, v_ in parts]

    def _angles(self, index: int, tokens: _Tokens, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The cosines and sines [T, 1, head_dim / 2] of a layer's rotary embedding."""
        rope = self._weights.arch.ropes[index]
        if id(rope) not in tokens.angles:
            positions = torch.cat([part.flatten() for part in tokens.queries])
            freqs = positions[:, None].to(torch.float32) * self._frequencies[index]
            cos, sin = ((part * rope.factor).to(dtype)[:, None] for part in (freqs.cos(), freqs.sin()))
            tokens.angles[id(rope)] = cos, sin
        return tokens.angles[id(rope)]


def _wanted_indices(batch: FlatBatch) -> Tensor:
    """Where in a batch the tokens lie after which logits are wanted."""
    indices: list[int] = []
    end = 0
    for chunk, wanted in zip(batch.chunks, batch.wanted, strict=True):
        end += chunk.count
        indices += range(end - wanted, end)
    return torch.tensor(indices, dtype=torch.int64)


def sparse_gate(gate: Tensor, share: float) -> Tensor:
    """What exceeds a row's cutoff, and 0 elsewhere: of a normal distribution, `share` of the channels. gate: [T, N]."""
    deviations = torch.tensor(NormalDist().inv_cdf(share), dtype=gate.dtype, device=gate.device)
    cutoff = gate.mean(-1, keepdim=True) + gate.std(-1, keepdim=True, unbiased=False) * deviations
    return F.relu(gate - cutoff)
