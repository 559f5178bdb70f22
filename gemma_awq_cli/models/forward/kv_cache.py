"""Keys and values of what was read, in memory taken once: sliding layers keep their window and no more.

A layer's slots are a ring: position p lies in slot p % slots. A layer that sees everything has a slot for every
position, so its ring never turns.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_awq_cli.models.gemma.architecture import Architecture


@dataclass(frozen=True)
class KVCache:
    """keys, values: one [R, kv_heads, slots, head_dim] a layer; lengths: tokens read so far, one a row."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    lengths: list[int]
    capacity: int

    @property
    def nbytes(self) -> int:
        return 2 * sum(layer.nbytes for layer in self.keys)

    def repeated(self, rows: int) -> "KVCache":
        """The one row of this cache as `rows` equal ones."""
        keys, values = (tuple(layer.repeat(rows, 1, 1, 1) for layer in part) for part in (self.keys, self.values))
        return KVCache(keys, values, self.lengths * rows, self.capacity)

    def require_room(self, tokens: Sequence[Sequence[int]], vocabulary: int) -> None:
        """An error of the caller's: rows, tokens or positions that are not there. Compiled code checks nothing."""
        if len(tokens) != len(self.lengths) or not any(tokens):
            raise ValueError(f"{len(tokens)} rows, all of them empty perhaps, for a cache of {len(self.lengths)}")
        if any(length + len(new) > self.capacity for length, new in zip(self.lengths, tokens, strict=True)):
            raise ValueError(f"more tokens than the cache's capacity of {self.capacity}")
        if any(not 0 <= token < vocabulary for new in tokens for token in new):
            raise ValueError(f"a token that is not in the vocabulary of {vocabulary}")


def make_cache(arch: Architecture, rows: int, capacity: int, device: torch.device, dtype: torch.dtype) -> KVCache:
    """An empty cache of `rows` rows, each of at most `capacity` tokens."""

    def layer(window: int | None) -> Tensor:
        slots = min(window or capacity, capacity)
        return torch.zeros(rows, arch.kv_heads, slots, arch.head_dim, device=device, dtype=dtype)

    keys, values = (tuple(layer(window) for window in arch.windows) for _ in range(2))
    return KVCache(keys, values, [0] * rows, capacity)


def slot_positions(ends: Tensor, slots: int) -> Tensor:
    """Which position each slot of a ring holds when positions 0 .. ends - 1 were written: [B] -> [B, slots].

    Negative where nothing was written yet.
    """
    last = ends[:, None] - 1
    return last - (last - torch.arange(slots, device=ends.device)) % slots
