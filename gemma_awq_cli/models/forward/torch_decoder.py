"""A forward of our own in torch, over a static cache: it computes what transformers computes, with less around it.

The tokens of all rows of a batch form one flat sequence, so there is no padding that could change anything: linears see
[T, hidden], and attention sees each row's own keys. Layers at the end that read other layers' keys and values see only
the tokens after which logits are wanted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from gemma_awq_cli.kernels.plain_ops import split_qkv
from gemma_awq_cli.models.forward.cached_attention import (
    CacheTensors,
    ChunkGroup,
    Held,
    attend,
    cache_tensors,
    chunk_groups,
    extend,
)
from gemma_awq_cli.models.forward.cached_session import CachedSession
from gemma_awq_cli.models.forward.kv_cache import SPARE, KVCache, make_cache
from gemma_awq_cli.models.forward.prefill import FlatBatch
from gemma_awq_cli.models.forward.session import Logits
from gemma_awq_cli.models.forward.torch_layers import LayerOps, Rotary, TextWeights, TorchLayers, head_facts
from gemma_awq_cli.system.arrays import DTYPES, as_array

# What it implements of `models.gemma.features.FEATURES`.
FEATURES = frozenset({
    "post_norms", "qk_norm", "attention_softcap", "final_softcap", "sliding_window", "value_norm", "keys_are_values",
    "shared_kv", "per_layer_inputs", "layer_scalar", "altup", "sparse_gate", "experts",
})  # fmt: skip

# Measured as those of the compiled decoder, in float32: from two tokens on, it costs little how many there are.
READING_COSTS = (1.0, *(2.0 + 0.02 * more for more in range(SPARE)))


@dataclass(frozen=True)
class FlatTokens:
    """The tokens [T] of a flat batch: see `Tokens`.

    groups: their chunks; queries: the positions of each group's tokens; positions: of all, [T]; cached: what they read
    and write; held: what the tokens of each group see, by the layer whose keys and values these are; angles: see
    `Rotary.angles`.
    """

    weights: TextWeights
    rotary: Rotary
    cached: CacheTensors
    groups: tuple[ChunkGroup, ...]
    queries: tuple[Tensor, ...]
    positions: Tensor
    embedded: Tensor
    per_layer: Tensor | None
    held: dict[int, list[Held]] = field(default_factory=dict)
    angles: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def only(self, kept: Tensor) -> "FlatTokens":
        """Those tokens after which logits are wanted. kept: their indices."""
        queries = tuple(group.queries for group in self.groups)
        per_layer = None if self.per_layer is None else self.per_layer[kept]
        return replace(
            self, queries=queries, positions=self.positions[kept], embedded=self.embedded[kept], per_layer=per_layer,
            angles={},
        )  # fmt: skip

    def attended(self, index: int, qkv: Tensor) -> Tensor:
        """See `Tokens.attended`."""
        arch, layout = self.weights.arch, self.weights.arch.layouts[index]
        cos, sin = self.rotary.angles(index, self.positions, qkv.dtype, self.angles)
        facts = head_facts(self.weights, index)
        q, k, v = split_qkv(qkv, cos=cos, sin=sin, head_dim=layout.head_dim, **facts)
        if layout.kv_source is None:
            sizes = [group.positions.numel() for group in self.groups]
            parts = zip(self.groups, k.split(sizes), v.split(sizes), strict=True)
            self.held[index] = [extend(self.cached, index, group, k_, v_) for group, k_, v_ in parts]
        held = self.held[index if layout.kv_source is None else layout.kv_source]
        sizes = [part.numel() for part in self.queries]
        attended = [
            attend(part, seen, at, layout.window, arch.query_scale, arch.attention_softcap)
            for part, seen, at in zip(q.split(sizes), held, self.queries, strict=True)
            if len(part)
        ]
        if layout.kv_source is None and index not in arch.kv_sources:
            del self.held[index]
        return torch.cat(attended)


class DecoderSession(CachedSession):
    """A `Session` over `TextWeights` on the device where these are, with a cache of its own unless it gets one."""

    reading_costs = READING_COSTS
    exact_reading = False  # torch sums products of one row and of several up in different orders

    def __init__(
        self,
        weights: TextWeights,
        rows: int,
        capacity: int,
        cache: KVCache | None = None,
        ops: LayerOps | None = None,
    ) -> None:
        arch = weights.arch
        cache = cache or make_cache(arch.layouts, rows, capacity, DTYPES[str(weights.dtype).removeprefix("torch.")])
        super().__init__(cache, arch.vocabulary)
        self._weights = weights
        self._layers = TorchLayers(weights, ops or LayerOps())
        self._rotary = Rotary(arch, weights.device)

    def _share_cache(self) -> None:
        self._cached = cache_tensors(self._cache)

    @torch.inference_mode()
    def last_logits(self, tokens: Sequence[Sequence[int]], counts: Sequence[int]) -> Logits:
        """See `Session.last_logits`."""
        return super().last_logits(tokens, counts)

    def _logits(self, parts: list[Tensor]) -> Logits:
        """Final states [R, hidden] -> [R, V] float32."""
        return as_array(self._layers.logits(torch.cat(parts)))

    def _read(self, batch: FlatBatch) -> Tensor:
        """The last layer's output [R, hidden] of the wanted tokens."""
        arch = self._weights.arch
        tokens = self._tokens(batch)
        x = self._layers.start(tokens.embedded)
        for index in range(arch.first_kv_reader):
            x = self._layers.output(index, x, tokens)
        kept = _wanted_indices(batch).to(x.device)
        x, tokens = x[..., kept, :], tokens.only(kept)
        if kept.numel():  # tokens of this batch are wanted
            for index in range(arch.first_kv_reader, arch.layers):
                x = self._layers.output(index, x, tokens)
        return self._layers.end(x)

    def _tokens(self, batch: FlatBatch) -> FlatTokens:
        arch, weights = self._weights.arch, self._weights
        ids = torch.tensor(batch.ids)
        groups = chunk_groups(batch, arch.first_kv_reader < arch.layers, weights.device)
        return FlatTokens(
            weights=weights,
            rotary=self._rotary,
            cached=self._cached,
            groups=groups,
            queries=tuple(group.positions for group in groups),
            positions=torch.cat([group.positions.flatten() for group in groups]),
            embedded=self._layers.embedded(ids.to(weights.device)),
            per_layer=None if weights.per_layer is None else weights.per_layer.rows(ids),
        )


def _wanted_indices(batch: FlatBatch) -> Tensor:
    """Where in a batch the tokens lie after which logits are wanted."""
    indices: list[int] = []
    end = 0
    for chunk, wanted in zip(batch.chunks, batch.wanted, strict=True):
        end += chunk.count
        indices += range(end - wanted, end)
    return torch.tensor(indices, dtype=torch.int64)
