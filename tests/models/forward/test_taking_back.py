"""Several tokens read at once and some of them taken back: the logits are those of reading one by one.

In the compiled decoder they are the same bits, which is what lets the engine draft tokens without changing any text.
"""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from gemma_awq_cli.models.forward.cached_session import CachedSession
from gemma_awq_cli.models.forward.kv_cache import SPARE
from gemma_awq_cli.models.forward.loading import OpenModel, open_model
from gemma_awq_cli.models.forward.native_session import NativeSession
from gemma_awq_cli.models.forward.precision import Precision
from gemma_awq_cli.models.forward.session import Logits
from gemma_awq_cli.models.forward.torch_decoder import DecoderSession
from tests.conftest import FORWARDS

CAPACITY = 120  # the rings of the sliding window of 16 wrap around three times
PROMPT = 5


def row(seed: int) -> list[int]:
    rng = random.Random(seed)
    return [2, *(rng.randrange(6, 260) for _ in range(CAPACITY - 1))]


def one_by_one(session: CachedSession, ids: list[int]) -> Logits:
    """The logits after each token but those of the prompt, whose last one has the first."""
    logits = [session.next_logits([ids[:PROMPT]])]
    logits += [session.next_logits([[token]]) for token in ids[PROMPT:]]
    return np.concatenate(logits)


def drafted(session: CachedSession, ids: list[int], seed: int) -> Iterator[Logits]:
    """The same with drafts after each token, of which the first few are right."""
    rng = random.Random(seed)
    yield session.next_logits([ids[:PROMPT]])
    read = PROMPT
    while read < len(ids):
        longest = min(len(session.reading_costs) - 1, len(ids) - read - 1)
        right = rng.randrange(longest + 1) if rng.random() < 0.7 else 0
        wrong = rng.randrange(longest - right + 1)
        tokens = [*ids[read : read + right + 1], *(rng.randrange(6, 260) for _ in range(wrong))]
        yield session.last_logits([tokens], [len(tokens)])[: right + 1]
        read += right + 1
        assert session.shorten_row(0, read) == read


def sessions(opened: OpenModel, kind: type[CachedSession]) -> tuple[CachedSession, CachedSession]:
    one, other = opened.session(1, CAPACITY), opened.session(1, CAPACITY)
    assert isinstance(one, kind)
    assert isinstance(other, kind)
    return one, other


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("packed", [True, False], ids=["4 bits", "16 bits"])
@pytest.mark.parametrize("kind", FORWARDS)
def test_the_compiled_decoder_gives_the_same_bits(
    kind: str,
    packed: bool,
    threads: int,
    checkpoints: Callable[[str], Path],
    artifacts: Callable[[str], Path],
) -> None:
    opened = open_model((artifacts if packed else checkpoints)(kind), "cpu")
    if not isinstance(opened.session(1, 1), NativeSession):
        pytest.skip(opened.kernel_report()[0])
    torch.set_num_threads(threads)
    one, other = sessions(opened, NativeSession)
    assert other.exact_reading
    ids = row(1)
    assert np.array_equal(np.concatenate(list(drafted(other, ids, 2))), one_by_one(one, ids))


@pytest.mark.parametrize("kind", FORWARDS)
def test_the_torch_decoder_gives_the_same_logits(kind: str, checkpoints: Callable[[str], Path]) -> None:
    dtype = "float32" if kind == "gemma4-experts" else "float64"
    opened = open_model(checkpoints(kind), "cpu", Precision(dtype))
    one, other = sessions(opened, DecoderSession)
    ids = row(3)
    expected = one_by_one(one, ids)
    given = np.concatenate(list(drafted(other, ids, 4)))
    apart = np.linalg.norm(given - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert apart.max() < (5e-2 if dtype == "float32" else 1e-3)


def test_more_than_is_spare_cannot_be_taken_back(checkpoints: Callable[[str], Path]) -> None:
    """Each time a few, or all at once: what the rings have lost is not taken for what it was."""
    opened = open_model(checkpoints("gemma3"), "cpu", Precision("float32"))
    session, _ = sessions(opened, DecoderSession)
    ids = row(5)
    session.next_logits([ids[:100]])
    assert session.shorten_row(0, 100 - SPARE) == 100 - SPARE
    session.next_logits([ids[:2]])
    assert session.shorten_row(0, 100 - SPARE) == 100 - SPARE
    assert session.shorten_row(0, 100 - SPARE - 1) == 0
    assert session.length(0) == 0


def test_a_row_saved_after_tokens_were_taken_back_holds_no_more_than_it_has(
    checkpoints: Callable[[str], Path],
) -> None:
    opened = open_model(checkpoints("gemma3"), "cpu", Precision("float32"))
    session, other = sessions(opened, DecoderSession)
    ids = row(6)
    session.next_logits([ids[:40]])  # more than the ring's 32 slots
    assert session.shorten_row(0, 30) == 30
    saved = session.save_row(0)
    assert saved.holds(30)
    assert not saved.holds(29)  # positions 0 to 7 are overwritten: an end at 23 would miss some
    other.load_row(0, saved, 30)
    assert other.shorten_row(0, 23) == 0


def test_a_mark_brings_back_a_row_whose_tokens_were_taken_back(checkpoints: Callable[[str], Path]) -> None:
    opened = open_model(checkpoints("gemma3"), "cpu", Precision("float32"))
    session, other = sessions(opened, DecoderSession)
    ids = row(7)
    session.next_logits([ids[:50]])
    session.shorten_row(0, 40)
    mark = session.mark_row(0)
    session.next_logits([ids[60:100]])
    assert session.shorten_row(0, 40, mark) == 40
    expected = other.next_logits([ids[:41]])
    assert np.allclose(session.next_logits([ids[40:41]]), expected, rtol=1e-3, atol=1e-3)
