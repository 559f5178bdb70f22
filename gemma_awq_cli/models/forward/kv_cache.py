"""Keys and values of the tokens that were read, in memory allocated once: sliding layers keep little but their window.

A layer's slots are a ring: position p is in slot p % slots. It has SPARE slots more than its window, so that the last
tokens can be taken back: what they have overwritten, no token sees any more. A layer without a window has a slot for
every position, so its ring never wraps around. A layer without keys and values of its own has the arrays of the layer
whose it reads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemma_awq_cli.models.gemma.layers import LayerLayout
from gemma_awq_cli.system.arrays import Array

SPARE = 16  # tokens that can be taken back at any time


@dataclass(frozen=True)
class SavedRow:
    """A copy of what one row of a cache holds.

    layers: keys and values of each layer with a cache of its own, [kv_heads, used slots, head_dim]; length: how many
    tokens the row had read; reached: as in `KVCache`; shortest: the slots of the smallest layer.
    """

    layers: tuple[Array, ...]
    length: int
    reached: int
    shortest: int

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def holds(self, length: int) -> bool:
        """Whether the row as it was after its first `length` tokens is in it.

        A ring that has wrapped around has lost tokens that an earlier end would still see.
        """
        return 0 < length <= self.length and (length == self.length or self.reached <= self.shortest)


@dataclass(frozen=True)
class Mark:
    """What brings one row back to an earlier end although its rings have wrapped around since.

    rings: copies of the layers whose slots are fewer than the cache's capacity, where the cache is; length: how many
    tokens the row had read; reached: as in `KVCache`. All other slots of that time are still there while the row only
    reads on.
    """

    rings: tuple[Any, ...]
    length: int
    reached: int


@dataclass(frozen=True)
class KVCache:
    """keys, values: [R, kv_heads, slots, head_dim] per layer, one array (or tensor) for all layers that share it.

    lengths: how many tokens each row has read. reached: the most that it had read, of those that were taken back since;
    so far its slots have been overwritten.
    """

    keys: tuple[Any, ...]
    values: tuple[Any, ...]
    lengths: list[int]
    reached: list[int]
    capacity: int

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self._own)

    @property
    def _own(self) -> list[Any]:
        return list({id(layer): layer for layer in (*self.keys, *self.values)}.values())

    @property
    def _rings(self) -> list[Any]:
        return [layer for layer in self._own if layer.shape[2] < self.capacity]

    def mark(self, row: int) -> Mark:
        """What `shorten` needs to come back to the row as it is now."""
        length = self.lengths[row]
        rings = tuple(self._kept(ring[row, :, : min(length, ring.shape[2])]) for ring in self._rings)
        return Mark(rings, length, self._reached(row))

    def shorten(self, row: int, length: int, mark: Mark | None = None) -> int:
        """Forget what a row has read after its first `length` tokens; return `length`, or 0 if it had to forget all.

        mark: of this row, which has only read on since then, except for tokens that were taken back. While no ring has
        wrapped around, any length is possible; after that only the mark's, and the last SPARE tokens can be taken back.
        """
        reached = self._reached(row)
        if length < self.lengths[row] and reached > min(layer.shape[2] for layer in self._own):
            if mark is not None and mark.length == length:
                for ring, copy in zip(self._rings, mark.rings, strict=True):
                    self._restore(ring[row, :, : copy.shape[1]], copy)
                reached = mark.reached
            elif reached - length > SPARE:
                length = reached = 0
        self.lengths[row], self.reached[row] = length, reached
        return length

    def reset(self, row: int) -> None:
        """Forget all that a row has read."""
        self.lengths[row] = self.reached[row] = 0

    def _reached(self, row: int) -> int:
        return max(self.lengths[row], self.reached[row])

    def save(self, row: int) -> SavedRow:
        """A copy of one row, as long as it is."""
        length = self.lengths[row]
        layers = tuple(self._saved(layer[row, :, : min(length, layer.shape[2])]) for layer in self._own)
        return SavedRow(layers, length, self._reached(row), min(layer.shape[2] for layer in self._own))

    def fits(self, saved: SavedRow) -> bool:
        """Whether a saved row of unknown origin has the shapes and dtypes of this cache's rows."""
        shapes = [(layer.shape[1], min(saved.length, layer.shape[2]), layer.shape[3]) for layer in self._own]
        return saved.length <= self.capacity and [(layer.shape, layer.dtype) for layer in saved.layers] == [
            (shape, self._dtype(layer)) for shape, layer in zip(shapes, self._own, strict=True)
        ]

    def load(self, row: int, saved: SavedRow, length: int) -> None:
        """Bring one row to the state after the first `length` tokens of a saved one. `saved` must hold it."""
        assert saved.holds(length)
        for layer, copy in zip(self._own, saved.layers, strict=True):
            self._restore(layer[row, :, : copy.shape[1]], copy)
        self.lengths[row], self.reached[row] = length, saved.reached

    # What depends on where the cache is.

    def _kept(self, part: Any) -> Any:
        """A copy of a part of the cache, where the cache is."""
        return part.copy()

    def _saved(self, part: Any) -> Array:
        """A copy of a part of the cache in the memory of the host."""
        found: Array = part.copy()
        return found

    def _restore(self, part: Any, copy: Any) -> None:
        """Write to a part of the cache what `_kept` or `_saved` returned."""
        part[:] = copy

    def _dtype(self, layer: Any) -> np.dtype[Any]:
        """The dtype of what `_saved` returns of a layer."""
        found: np.dtype[Any] = layer.dtype
        return found

    def repeated(self, rows: int) -> "KVCache":
        """A cache of `rows` equal rows, from this cache of one row."""
        repeated = {id(layer): np.repeat(layer, rows, 0) for layer in (*self.keys, *self.values)}
        keys, values = (tuple(repeated[id(layer)] for layer in part) for part in (self.keys, self.values))
        return KVCache(keys, values, self.lengths * rows, self.reached * rows, self.capacity)

    def require_room(self, tokens: Sequence[Sequence[int]], vocabulary: int) -> None:
        """Raise ValueError for rows, tokens or positions that do not exist: the compiled code checks nothing."""
        if len(tokens) != len(self.lengths):
            raise ValueError(f"tokens for {len(tokens)} rows; the cache has {len(self.lengths)} rows")
        if not any(tokens):
            raise ValueError("no tokens for any of the rows")
        if any(length + len(new) > self.capacity for length, new in zip(self.lengths, tokens, strict=True)):
            raise ValueError(f"more tokens than the cache's capacity of {self.capacity}")
        if any(not 0 <= token < vocabulary for new in tokens for token in new):
            raise ValueError(f"a token outside the vocabulary of {vocabulary}")


def make_cache(
    layouts: Sequence[LayerLayout],
    rows: int,
    capacity: int,
    dtype: np.dtype[Any],
    width: Callable[[int], int] = lambda head_dim: head_dim,
) -> KVCache:
    """An empty cache of `rows` rows, each of at most `capacity` tokens.

    width: how many elements hold a key or a value of head_dim numbers; they take the place of head_dim in the arrays.
    """

    def layers() -> tuple[Array, ...]:
        made: list[Array] = []
        for layout in layouts:
            if layout.kv_source is not None:
                made.append(made[layout.kv_source])
                continue
            slots = min(layout.window + SPARE, capacity) if layout.window else capacity
            made.append(np.zeros((rows, layout.kv_heads, slots, width(layout.head_dim)), dtype))
        return tuple(made)

    return KVCache(layers(), layers(), [0] * rows, [0] * rows, capacity)
