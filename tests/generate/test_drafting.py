"""Drafts from the row itself: what is drafted, how much of it, and how little a row loses that copies nothing."""

import random
from collections.abc import Sequence
from itertools import accumulate

import pytest

from gemma_awq_cli.generate.drafting import LookupDrafter, Speed, Worth

COSTS = [1.0, 1.1, 1.3, 1.4, *(1.65 + 0.23 * more for more in range(11))]


def replay(prompt: Sequence[int], answer: Sequence[int]) -> tuple[float, int, int]:
    """Return what an answer costs, in readings of one token, and how many tokens were drafted and were right."""
    drafter = LookupDrafter(COSTS, prompt)
    drafter.take(answer[:1])
    at, spent, drafted, accepted = 1, 0.0, 0, 0
    while at < len(answer):
        draft = drafter.draft(len(answer) - at - 1)
        assert len(draft) < len(COSTS)
        assert len(draft) < len(answer) - at
        right = 0
        while right < len(draft) and draft[right] == answer[at + right]:
            right += 1
        spent += COSTS[len(draft)]
        drafted += len(draft)
        accepted += right
        drafter.take(answer[at : at + right + 1])
        at += right + 1
    return spent, drafted, accepted


def words(seed: int, count: int, vocabulary: int = 50_000) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(vocabulary) for _ in range(count)]


def test_a_draft_is_what_followed_the_longest_match() -> None:
    drafter = LookupDrafter(COSTS, [7, 1, 2, 3, 4, 5, 6, 8, 2, 3, 9, 9, 9, 0, 1, 2])
    drafter.take([3])
    draft = list(drafter.draft(15))
    assert draft  # 1, 2, 3 stood before 4; 2, 3 alone stood before 9, and later
    assert draft == [4, 5, 6, 8, 2, 3, 9, 9, 9, 0, 1, 2, 3, 4, 5][: len(draft)]


def test_nothing_is_drafted_where_nothing_is_repeated() -> None:
    assert replay(list(range(100)), list(range(100, 300)))[1] == 0


def test_a_copy_is_read_in_long_steps() -> None:
    text = words(0, 200)
    spent, drafted, accepted = replay([*text, 60_000], text)
    assert accepted > 0.9 * drafted
    assert spent < 0.35 * len(text)


def test_a_text_that_repeats_itself_is_drafted_beyond_its_own_end() -> None:
    spent, _, _ = replay([1], [5, 6, 7] * 60)
    assert spent < 0.35 * 180


def test_a_copy_goes_on_behind_each_change() -> None:
    text = words(1, 300)
    edited = [token if place % 10 else 60_000 + place for place, token in enumerate(text)]
    spent, drafted, accepted = replay([*text, 70_000], edited)
    assert spent < 0.6 * len(text)
    assert accepted > 0.6 * drafted


@pytest.mark.parametrize("seed", range(5))
def test_a_row_whose_drafts_are_wrong_loses_next_to_nothing(seed: int) -> None:
    """Pairs of tokens come again and again, and never what came after them."""
    rng = random.Random(seed)
    pairs = [(2 * number, 2 * number + 1) for number in range(12)]
    answer = [token for place in range(200) for token in (*rng.choice(pairs), 1000 + place)]
    spent, drafted, accepted = replay([], answer)
    assert drafted > accepted
    assert spent < len(answer) + 3  # steps of 600


def test_the_same_row_has_the_same_drafts() -> None:
    text = words(2, 100, 30)
    assert replay(text, words(3, 200, 30)) == replay(text, words(3, 200, 30))


def test_no_draft_is_longer_than_asked_for() -> None:
    text = words(4, 50)
    drafter = LookupDrafter(COSTS, [*text, *text[:20]])
    assert len(drafter.draft(15)) > 2
    assert len(drafter.draft(2)) == 2
    assert list(drafter.draft(0)) == []


@pytest.mark.parametrize("seed", range(20))
def test_the_length_is_the_one_that_gains_most(seed: int) -> None:
    rng = random.Random(seed)
    costs = list(accumulate([1.0, *(rng.uniform(0, 0.5) for _ in range(10))]))
    chances = [rng.random() for _ in range(10)]
    whole = list(accumulate(chances, lambda one, other: one * other))
    # at the start a step has brought one token, so that a reading of one token is worth one
    gains = [sum(whole[:length]) - (costs[length] - 1) for length in range(11)]
    assert gains[Worth(costs, Speed()).length(chances)] == pytest.approx(max(gains))


def test_where_steps_bring_much_a_draft_has_to_bring_more() -> None:
    worth = Worth(COSTS, Speed())
    chances = [0.6, 0.6, 0.6, 0.6]
    before = worth.length(chances)
    for _ in range(100):
        worth.learn(drafted=3, taken=4)
    assert worth.length(chances) < before
