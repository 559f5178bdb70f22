"""Keys and values of prompts that were read before, for requests that begin alike: system prompts, chat histories."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gemma_awq_cli.models.forward.kv_cache import SavedRow

WORTH_KEEPING = 16  # tokens; to read fewer again takes less time than to copy them

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class _Entry:
    ids: Ids
    saved: SavedRow


class Found(NamedTuple):
    """What the cache knows of a prompt.

    saved, length: a state that holds the prompt's first `length` tokens, None and 0 if there is none. shared: how many
    of its tokens some earlier prompt began with too; more than `length` if no state was kept there.
    """

    saved: SavedRow | None
    length: int
    shared: int


class PrefixCache:
    """States of rows by their token ids. The least recently used are dropped beyond `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self.nbytes = 0

    def find(self, ids: Sequence[int]) -> Found:
        """The longest usable state that a prompt begins with; at least one of its tokens stays unread."""
        wanted = np.asarray(ids, np.int32)
        best, length, shared = None, 0, 0
        for key, entry in self._entries.items():
            common = min(_common(wanted, entry.ids), len(ids) - 1)
            shared = max(shared, common)
            if common > length and entry.saved.holds(common):
                best, length = key, common
        if best is None:
            return Found(None, 0, shared)
        self._entries.move_to_end(best)
        return Found(self._entries[best].saved, length, shared)

    def add(self, ids: Sequence[int], saved: SavedRow) -> None:
        """Keep the state after `ids`, which has `saved.length` of them; drop those that it makes superfluous."""
        kept = np.asarray(ids[: saved.length], np.int32)
        if saved.length < WORTH_KEEPING or saved.nbytes > self._limit:
            return
        for key, entry in list(self._entries.items()):
            inside = len(entry.ids) <= len(kept) and _common(kept, entry.ids) == len(entry.ids)
            if inside and saved.holds(len(entry.ids)):
                self._drop(key)
        self._entries[kept.tobytes()] = _Entry(kept, saved)
        self.nbytes += saved.nbytes
        while self.nbytes > self._limit:
            self._drop(next(iter(self._entries)))

    def _drop(self, key: bytes) -> None:
        self.nbytes -= self._entries.pop(key).saved.nbytes


def _common(one: Ids, other: Ids) -> int:
    """How many ids two rows have in common at their beginnings."""
    size = min(len(one), len(other))
    different = np.flatnonzero(one[:size] != other[:size])
    return int(different[0]) if len(different) else size
