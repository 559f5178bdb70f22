"""The cache finds what a look at every state would find, up to a block less, and stays within its bytes."""

import random

import pytest
import torch

from gemma_awq_cli.models.forward.kv_cache import SavedRow
from gemma_awq_cli.serve.prefix_cache import BLOCK, WORTH_KEEPING, PrefixCache

SHORTEST = 60  # slots of the smallest layer: a longer row has wrapped around


def saved(ids: list[int]) -> SavedRow:
    """A row whose state is its ids, so that a wrong one shows."""
    return SavedRow((torch.tensor(ids, dtype=torch.int32)[None, :, None],), len(ids), len(ids), SHORTEST)


def common(one: list[int], other: list[int]) -> int:
    return next(
        (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


@pytest.mark.parametrize("limit", [10**9, 4 * 3000])
def test_it_finds_what_a_look_at_all_would_find(limit: int) -> None:
    draw = random.Random(limit)
    cache = PrefixCache(limit)
    rows: list[list[int]] = [[]]
    found_tokens = 0
    for _ in range(600):
        start = draw.choice(rows)[: draw.randrange(100)]
        ids = start + [draw.randrange(3) for _ in range(draw.randrange(1, 50))]
        found = cache.find(ids)
        assert found.length < len(ids)
        assert found.shared >= found.length
        if found.saved is not None:
            assert found.saved.holds(found.length)
            assert found.saved.layers[0][0, : found.length, 0].tolist() == ids[: found.length]
            found_tokens += found.length
        if limit == 10**9:
            kept = [row for row in rows if len(row) >= WORTH_KEEPING]
            lengths = [min(common(ids, row), len(ids) - 1) for row in kept]
            usable = [length for length, row in zip(lengths, kept, strict=True) if saved(row).holds(length)]
            best = max(usable, default=0)
            assert found.length > best - BLOCK if best >= BLOCK else found.length <= BLOCK
            assert found.shared > max(lengths, default=0) - BLOCK
        cache.add(ids, saved(ids))
        rows.append(ids)
        assert cache.nbytes == sum(entry.saved.nbytes for entry in cache._entries.values()) <= limit
    assert found_tokens > 5000
    for key in list(cache._entries):
        cache._drop(key)
    assert (cache.nbytes, cache._through, cache._whole, cache._ending) == (0, {}, {}, {})


def test_a_state_replaces_those_that_it_holds() -> None:
    cache = PrefixCache(10**9)
    ids = [number % 7 for number in range(55)]
    for length in (20, 40, 55, 55):
        cache.add(ids[:length], saved(ids[:length]))
    assert len(cache._entries) == 1
    cache.add([*ids, *range(50)], saved([*ids, *range(50)]))  # has wrapped around: holds no earlier state
    assert len(cache._entries) == 2
