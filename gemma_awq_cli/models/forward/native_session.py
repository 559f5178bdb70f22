"""A session over the compiled decoder: one call into C++ per token, or per batch of a prompt's tokens."""

from collections.abc import Sequence
from ctypes import c_void_p

import numpy as np

from gemma_awq_cli.kernels.native.structures import CacheSpec, ChunkSpec, int64s
from gemma_awq_cli.models.forward.cached_session import CachedSession
from gemma_awq_cli.models.forward.kv_cache import KVCache, make_cache
from gemma_awq_cli.models.forward.native_weights import MANY_TOKENS, NativeText
from gemma_awq_cli.models.forward.prefill import FlatBatch
from gemma_awq_cli.models.forward.session import Logits
from gemma_awq_cli.system.arrays import BFLOAT16, address
from gemma_awq_cli.system.threads import thread_count


class NativeSession(CachedSession):
    """A `Session` over `NativeText` of `rows` rows, each of at most `capacity` tokens."""

    def __init__(self, text: NativeText, rows: int, capacity: int) -> None:
        self._text = text
        super().__init__(make_cache(text.arch.layouts, rows, capacity, BFLOAT16), text.arch.vocabulary)

    def _share_cache(self) -> None:
        """Hand the cache to C++, and to the torch decoder where that is faster: both keep the same one."""
        self._torch = None
        if self._text.dense is not None:
            from gemma_awq_cli.models.forward.torch_decoder import DecoderSession

            self._torch = DecoderSession(self._text.dense, 0, 0, self._cache)
        self._spec = cache_spec(self._cache)

    def last_logits(self, tokens: Sequence[Sequence[int]], counts: Sequence[int]) -> Logits:
        """See `Session.last_logits`."""
        if self._torch is not None and sum(map(len, tokens)) >= MANY_TOKENS:
            return self._torch.last_logits(tokens, counts)
        return super().last_logits(tokens, counts)

    def _logits(self, parts: list[Logits]) -> Logits:
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _read(self, batch: FlatBatch) -> Logits:
        """The logits [R, V] float32 after the wanted tokens."""
        count = len(batch.chunks)
        specs = (ChunkSpec * count)()
        offset = 0
        for spec, chunk in zip(specs, batch.chunks, strict=True):
            spec.row, spec.start, spec.count, spec.offset = chunk.row, chunk.start, chunk.count, offset
            offset += chunk.count
        logits = np.empty((sum(batch.wanted), self._vocabulary), np.float32)
        ids = np.array(batch.ids, np.int32)
        self._text.library.forward(
            self._text.spec, self._spec, specs, count, address(ids), len(batch.ids), int64s(batch.wanted),
            address(logits), thread_count(),
        )  # fmt: skip
        return logits


def cache_spec(cache: KVCache) -> CacheSpec:
    """The cache as C++ reads it; `cache` must outlive it."""
    layers = len(cache.keys)
    return CacheSpec(
        keys=(c_void_p * layers)(*(address(layer) for layer in cache.keys)),
        values=(c_void_p * layers)(*(address(layer) for layer in cache.values)),
        slots=int64s(layer.shape[2] for layer in cache.keys),
    )
