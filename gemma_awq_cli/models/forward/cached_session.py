"""What the sessions of the torch and the compiled decoder have in common: a KV cache, read in flat batches."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from gemma_awq_cli.models.forward.kv_cache import KVCache, Mark, SavedRow
from gemma_awq_cli.models.forward.prefill import FlatBatch, flat_batches
from gemma_awq_cli.models.forward.session import Leading, Logits


class CachedSession(ABC):
    """A `Session` whose rows are independent, and can take back the last tokens that they have read.

    vocabulary: how many tokens the model knows. reading_costs: what reading 1, 2, 3 ... tokens of a row at once costs,
    in readings of one token; of no more tokens than can be taken back but the first. exact_reading: whether so many
    tokens at once have bit for bit the logits that they have one by one.
    """

    independent_rows = True
    reading_costs: Sequence[float] = (1.0,)  # of more it is not known: nothing is drafted
    exact_reading = False

    def __init__(self, cache: KVCache, vocabulary: int) -> None:
        self._cache = cache
        self._vocabulary = vocabulary
        self._share_cache()

    @abstractmethod
    def _share_cache(self) -> None:
        """Hand a new cache to whoever else keeps it."""

    def next_logits(self, tokens: Sequence[Sequence[int]]) -> Logits:
        """See `Session.next_logits`."""
        return self.last_logits(tokens, [1] * len(tokens))

    def last_logits(self, tokens: Sequence[Sequence[int]], counts: Sequence[int]) -> Logits:
        """See `Session.last_logits`."""
        lengths = self._cache.lengths
        self._cache.require_room(tokens, self._vocabulary)
        parts = [self._read(batch) for batch in flat_batches(tokens, lengths, counts)]
        lengths[:] = [length + len(new) for length, new in zip(lengths, tokens, strict=True)]
        return self._logits(parts)

    def likeliest(self, tokens: Sequence[Sequence[int]]) -> list[int] | None:
        """Let some rows read one token each; the most likely next token of each of these, -1 if a logit is not finite.

        None, and nothing is read, if the session computes where its logits are read anyway.
        """
        return None

    def leading(self, logits: Logits, count: int) -> Leading | None:
        """The `count` largest of each row of logits [R, V] that came from this session; None if it is not faster."""
        return None

    def reset_row(self, row: int) -> None:
        """See `Session.reset_row`."""
        self._cache.reset(row)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values of all rows."""
        return self._cache.nbytes

    def length(self, row: int) -> int:
        """How many tokens a row has read."""
        return self._cache.lengths[row]

    def save_row(self, row: int) -> SavedRow:
        """A copy of what a row has read, to go on from in this session later."""
        return self._cache.save(row)

    def fits(self, saved: SavedRow) -> bool:
        """See `KVCache.fits`."""
        return self._cache.fits(saved)

    def load_row(self, row: int, saved: SavedRow, length: int) -> None:
        """Go on in a row from the first `length` tokens of a saved one, which must hold them."""
        self._cache.load(row, saved, length)

    def mark_row(self, row: int) -> Mark:
        """What `shorten_row` needs to bring a row back to what it has read now."""
        return self._cache.mark(row)

    def shorten_row(self, row: int, length: int, mark: Mark | None = None) -> int:
        """Forget what a row has read after its first `length` tokens; see `KVCache.shorten`."""
        return self._cache.shorten(row, length, mark)

    def repeat_row(self, rows: int) -> None:
        """See `Session.repeat_row`."""
        self._cache = self._cache.repeated(rows)
        self._share_cache()

    @abstractmethod
    def _read(self, batch: FlatBatch) -> Any:
        """Read a batch into the cache. What `_logits` makes logits of: a row for each wanted token, in their order."""

    @abstractmethod
    def _logits(self, parts: list[Any]) -> Logits:
        """The logits [R, V] float32 of what `_read` returned for each batch."""
