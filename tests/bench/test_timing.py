"""What one repetition of a speed measurement reads, with sessions that only keep count."""

from collections.abc import Sequence

import numpy as np
import pytest

from gemma_awq_cli.bench.timing import time_sessions
from gemma_awq_cli.models.forward.cached_session import CachedSession
from gemma_awq_cli.models.forward.kv_cache import KVCache
from gemma_awq_cli.models.forward.prefill import FlatBatch
from gemma_awq_cli.models.forward.session import Logits

Fed = list[list[list[int]]]


class Counting:
    """A session that cannot go back. Its most likely token is 3."""

    def __init__(self, fed: Fed) -> None:
        self.fed = fed

    def next_logits(self, tokens: Sequence[Sequence[int]]) -> Logits:
        self.fed.append([list(row) for row in tokens])
        return np.array([[0, 0, 0, 1]] * len(tokens), np.float32)


class GoingBack(CachedSession):
    """A session that can."""

    def __init__(self, fed: Fed, rows: int, capacity: int) -> None:
        super().__init__(KVCache((np.zeros((rows, 1, 2, 1)),), (np.zeros((rows, 1, 2, 1)),), [0] * rows, capacity), 99)
        self.fed = fed

    def next_logits(self, tokens: Sequence[Sequence[int]]) -> Logits:
        self.fed.append([[length] for length in self._cache.lengths])
        super().next_logits(tokens)
        return np.array([[0, 0, 0, 1]] * len(tokens), np.float32)

    def _share_cache(self) -> None:
        pass

    def _read(self, batch: FlatBatch) -> Logits:
        return np.zeros((1, 4), np.float32)

    def _logits(self, parts: list[Logits]) -> Logits:
        return parts[0]


@pytest.mark.parametrize("depth", [0, 5])
def test_a_session_that_cannot_go_back_reads_the_depth_twice(depth: int) -> None:
    opened: list[tuple[int, int]] = []
    fed: list[Fed] = []

    def session(rows: int, capacity: int) -> Counting:
        opened.append((rows, capacity))
        fed.append([])
        return Counting(fed[-1])

    before, prompts = [[2] * depth, [7] * depth], [[4, 4, 4], [5, 5, 5]]
    sample = time_sessions(session, 2, before, prompts, 2)
    assert len(sample.steps) == 2
    assert opened == [(2, depth + 5), (2, max(depth, 1) + 2)]
    steps = [[[3], [3]]] * 2
    assert fed == [[*([before] if depth else []), prompts, *steps], [before if depth else [[2], [2]], *steps]]


def test_a_session_that_can_reads_the_depth_once() -> None:
    fed: list[Fed] = []

    def session(rows: int, capacity: int) -> GoingBack:
        fed.append([])
        return GoingBack(fed[-1], rows, capacity)

    time_sessions(session, 2, [[2] * 5, [7] * 5], [[4, 4, 4], [5, 5, 5]], 2)
    lengths = [0, 5, 8, 9, 5, 6]  # the depth, the prompt, its answer, and decoding from the depth again
    assert fed == [[[[length], [length]] for length in lengths]]
