"""Keys and values of prompts that were read before, for requests that begin alike: system prompts, chat histories.

Token ids are compared in blocks: a hash of all ids up to the end of a block leads to the states that go through it. So
the time of a search depends on the length of the prompt, and hardly on the number of states.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gemma_awq_cli.models.forward.kv_cache import SavedRow

WORTH_KEEPING = 16  # tokens; to read fewer again takes less time than to copy them
BLOCK = 16  # tokens
_LOOKED_AT = 32  # states that go through the same block: of many alike, any will do

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class _Entry:
    ids: Ids
    saved: SavedRow


class Found(NamedTuple):
    """What the cache knows of a prompt.

    saved, length: a state that holds the prompt's first `length` tokens, None and 0 if there is none. shared: how many
    of its tokens some earlier prompt began with too, in whole blocks; more than `length` if no state was kept there.
    """

    saved: SavedRow | None
    length: int
    shared: int


class PrefixCache:
    """States of rows by their token ids. The least recently used are dropped beyond `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        # by the hash of a block's end: the states that go through it, those of them that hold every shorter length
        # too, and those that end before the next block does
        self._through: dict[int, int] = {}
        self._whole: dict[int, dict[bytes, None]] = {}
        self._ending: dict[int, dict[bytes, None]] = {}
        self.nbytes = 0

    def find(self, ids: Sequence[int]) -> Found:
        """A usable state for nearly the longest beginning of a prompt; at least one of its tokens stays unread."""
        wanted = np.asarray(ids, np.int32)
        known = []
        for block in _hashes(wanted):
            if block not in self._through:
                break
            known.append(block)
        shared = min(len(known) * BLOCK, len(ids) - 1)
        for block in reversed(known):
            best, length = None, 0
            for key in (*self._some(self._ending, block), *self._some(self._whole, block)):
                entry = self._entries[key]
                common = min(_common(wanted, entry.ids), len(ids) - 1)
                if common > length and entry.saved.holds(common):
                    best, length = key, common
            if best is not None:
                self._entries.move_to_end(best)
                return Found(self._entries[best].saved, length, max(length, shared))
        return Found(None, 0, shared)

    def add(self, ids: Sequence[int], saved: SavedRow) -> None:
        """Keep the state after `ids`, which has `saved.length` of them; drop those that it makes superfluous."""
        kept = np.asarray(ids[: saved.length], np.int32)
        if saved.length < WORTH_KEEPING or saved.nbytes > self._limit:
            return
        if (key := kept.tobytes()) in self._entries:
            self._drop(key)
        for block in _hashes(kept):
            for other in list(self._some(self._ending, block)):
                shorter = self._entries[other].ids
                if saved.holds(len(shorter)) and _common(kept, shorter) == len(shorter):
                    self._drop(other)
        self._entries[key] = _Entry(kept, saved)
        self._index(key, kept, saved)
        self.nbytes += saved.nbytes
        while self.nbytes > self._limit:
            self._drop(next(iter(self._entries)))

    def _some(self, index: dict[int, dict[bytes, None]], block: int) -> Iterator[bytes]:
        """The newest states of one block."""
        return islice(reversed(index.get(block, {})), _LOOKED_AT)

    def _index(self, key: bytes, ids: Ids, saved: SavedRow) -> None:
        blocks = list(_hashes(ids))
        for block in blocks:
            self._through[block] = self._through.get(block, 0) + 1
            if saved.holds(1):
                self._whole.setdefault(block, {})[key] = None
        self._ending.setdefault(blocks[-1], {})[key] = None

    def _drop(self, key: bytes) -> None:
        entry = self._entries.pop(key)
        self.nbytes -= entry.saved.nbytes
        for block in _hashes(entry.ids):
            self._through[block] -= 1
            if not self._through[block]:
                del self._through[block]
            for index in (self._whole, self._ending):
                if key in index.get(block, {}):
                    del index[block][key]
                    if not index[block]:
                        del index[block]


def _hashes(ids: Ids) -> Iterator[int]:
    """For each whole block, a hash of all ids up to its end."""
    before = 0
    for end in range(BLOCK, len(ids) + 1, BLOCK):
        before = hash((before, ids[end - BLOCK : end].tobytes()))
        yield before


def _common(one: Ids, other: Ids) -> int:
    """How many ids two rows have in common at their beginnings."""
    size = min(len(one), len(other))
    different = np.flatnonzero(one[:size] != other[:size])
    return int(different[0]) if len(different) else size
