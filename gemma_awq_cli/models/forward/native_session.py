"""A session over the compiled decoder: one call into C++ per token, or per batch of a prompt's tokens."""

from collections.abc import Sequence
from ctypes import c_void_p

import numpy as np

from gemma_awq_cli.kernels.native.structures import BF16, HELD_GROUP, INT8, CacheSpec, ChunkSpec, int64s
from gemma_awq_cli.models.forward.cached_session import CachedSession
from gemma_awq_cli.models.forward.kv_cache import KVCache, make_cache
from gemma_awq_cli.models.forward.kv_kinds import KV_16BIT, KV_INT8
from gemma_awq_cli.models.forward.native_weights import MANY_TOKENS, NativeText
from gemma_awq_cli.models.forward.prefill import FlatBatch
from gemma_awq_cli.models.forward.session import Leading, Logits
from gemma_awq_cli.system.arrays import BFLOAT16, ReusedMemory, address
from gemma_awq_cli.system.threads import thread_count

# Measured while decoding on two cores with AVX-512 VNNI, a little higher than `benchmarks/drafted_tokens.py --costs`
# shows of readings alone; two cores with AVX2 alone give the same within 12 %, but for 2 tokens, which cost 1.0 there.
# No longer than what torch is not faster at: its products round differently.
READING_COSTS = (1.0, 1.3, 1.5, 1.55, 2.0, 2.3, 2.6, 2.85, 3.2, 3.5, 3.8, 4.05, 4.35, 4.65, 4.95)
assert len(READING_COSTS) < MANY_TOKENS
REUSED_LOGITS = 32  # rows of logits in memory that is used again


class NativeSession(CachedSession):
    """A `Session` over `NativeText` of `rows` rows, each of at most `capacity` tokens."""

    reading_costs = READING_COSTS
    exact_reading = True  # each row of a product is summed up in the same order, however many rows there are

    def __init__(self, text: NativeText, rows: int, capacity: int, kv_cache: str = KV_16BIT) -> None:
        """kv_cache: one of `KV_CACHES`; int8 only where the torch decoder, which does not read it, has no part."""
        assert kv_cache == KV_16BIT or text.dense is None
        self._text = text
        layouts, vocabulary = text.arch.layouts, text.arch.vocabulary
        if kv_cache == KV_INT8:
            cache = make_cache(layouts, rows, capacity, np.dtype(np.uint8), _int8_width)
        else:
            cache = make_cache(layouts, rows, capacity, BFLOAT16)
        super().__init__(cache, vocabulary)
        self._memory = ReusedMemory(REUSED_LOGITS * vocabulary)

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

    def leading(self, logits: Logits, count: int) -> Leading:
        """See `CachedSession.leading`."""
        logits = np.ascontiguousarray(logits)
        rows, vocabulary = logits.shape
        found = Leading(np.empty((rows, count), np.float32), np.empty((rows, count), np.int32))
        self._text.library.leading(
            address(logits), rows, vocabulary, count, address(found.values), address(found.tokens), thread_count()
        )
        return found

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
        logits = self._memory.array(sum(batch.wanted), self._vocabulary)
        ids = np.array(batch.ids, np.int32)
        self._text.library.forward(
            self._text.spec, self._spec, specs, count, address(ids), len(batch.ids), int64s(batch.wanted),
            address(logits), thread_count(),
        )  # fmt: skip
        return logits


def _int8_width(head_dim: int) -> int:
    """Bytes of a key or a value in 8 bits: the numbers, and a scale of 4 bytes for each `HELD_GROUP` of them."""
    return head_dim + 4 * -(-head_dim // HELD_GROUP)


def cache_spec(cache: KVCache) -> CacheSpec:
    """The cache as C++ reads it; `cache` must outlive it."""
    layers = len(cache.keys)
    return CacheSpec(
        keys=(c_void_p * layers)(*(address(layer) for layer in cache.keys)),
        values=(c_void_p * layers)(*(address(layer) for layer in cache.values)),
        slots=int64s(layer.shape[2] for layer in cache.keys),
        kind=BF16 if cache.keys[0].dtype == BFLOAT16 else INT8,
    )
