"""Drafts of a row's next tokens: how long they pay, and those that the row itself has, from where its last tokens stood
before.

A model checks a draft by reading all of it at once, which costs less than reading its tokens one by one. How long a
draft is worth being depends on what such a reading costs and on how many of this row's drafts were right so far. All of
that is counted, never timed, so that the same row has the same drafts each time. Knows tokens only: no session, no
logits.

The lookup is that of prompt lookup decoding (A. Saxena, 2023); the choice of the length by the chance that a whole
draft is right is akin to SuffixDecoding's (arXiv:2411.04975).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

LONGEST = 16  # tokens of a match that are compared: how long it is beyond that tells nothing more
PLACES = 16  # where the last two tokens stood before, of which the one with the longest match is taken
NEAR = 8  # tokens behind a change among which a copy is taken up again
PATIENCE = 6  # steps after which a copy that has not been taken up again is given up
TRUST = 4.0  # drafted tokens that the first guess at their chance weighs as much as
_FADING = 0.98  # weight of a drafted token when another of its kind has come
_RECENT = 0.95  # weight of a step in the speed when another has come

# A first guess at the chance that a drafted token is right, by the length of the match that it continues: 0 is a single
# token near a change in a copy. From the texts of benchmarks/drafted_tokens.json, and lower than there, since a row
# that copies nothing is to lose nothing.
FIRST_CHANCES = {0: 0.35, 2: 0.4, 3: 0.5, 4: 0.55, 5: 0.6, 7: 0.7, 10: 0.75, LONGEST: 0.8}
_KINDS = [max(kind for kind in FIRST_CHANCES if kind <= max(length, 2)) for length in range(LONGEST + 1)]


class Drafter(Protocol):
    """Drafts the tokens of one row."""

    def draft(self, most: int) -> Sequence[int]:
        """Return at most `most` tokens that may come next; none if no draft is worth reading."""
        ...

    def take(self, tokens: Sequence[int]) -> None:
        """Take notice of the tokens that did come next, one or more."""
        ...


def matching(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two rows have in common at their beginnings, such as a draft and what came."""
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    return count


class Chances:
    """How likely drafted tokens are right, by kind, learned from those that were read."""

    def __init__(self, first: dict[int, float]) -> None:
        self._right = {kind: TRUST * chance for kind, chance in first.items()}
        self._read = dict.fromkeys(first, TRUST)
        self._first = first

    def of(self, kind: int) -> float:
        """Return the chance that a token of this kind is right if all drafted before it are."""
        return self._right[kind] / self._read[kind]

    def learn(self, kind: int, right: bool) -> None:
        """Count one token that was read behind right ones. The first guess keeps its weight."""
        guess = TRUST * self._first[kind]
        self._right[kind] = guess + (self._right[kind] - guess) * _FADING + right
        self._read[kind] = TRUST + (self._read[kind] - TRUST) * _FADING + 1


class Speed:
    """How many tokens the last steps of a row have brought in the time of reading one."""

    def __init__(self) -> None:
        self._tokens = self._spent = 1 / (1 - _RECENT)  # as if each step so far had brought one token

    @property
    def value(self) -> float:
        return self._tokens / self._spent

    def learn(self, taken: int, cost: float) -> None:
        """Count a step that brought `taken` tokens. cost: in readings of one token."""
        self._tokens = self._tokens * _RECENT + taken
        self._spent = self._spent * _RECENT + cost


class Worth:
    """How long drafts pay.

    costs: what a draft of 0, 1, 2 ... tokens costs with its reading, in readings of one token. A drafted token is worth
    its cost if the tokens that it is expected to bring are more than that time would bring elsewhere in the row. speed:
    of the row, which is learned here.
    """

    def __init__(self, costs: Sequence[float], speed: Speed) -> None:
        self._costs = costs
        self._speed = speed

    @property
    def longest(self) -> int:
        """The most tokens that a draft may have."""
        return len(self._costs) - 1

    def may_gain(self, whole: float, count: int) -> bool:
        """Return whether a draft of `count` tokens, all right with the chance `whole`, could gain by further ones."""
        left = self.longest - count
        return left > 0 and whole > self._speed.value * (self._costs[-1] - self._costs[count]) / left

    def length(self, chances: Iterable[float]) -> int:
        """Return how many tokens of a draft to read, given each one's chance; takes no more chances than are needed."""
        whole, gain, best, length = 1.0, 0.0, 0.0, 0
        for count, chance in enumerate(chances, 1):
            whole *= chance
            gain += whole - self._speed.value * (self._costs[count] - self._costs[count - 1])
            if gain > best:
                best, length = gain, count
            if count == self.longest:
                break
        return length

    def learn(self, drafted: int, taken: int) -> None:
        """Count a step that read `drafted` tokens beside the one that was certain, and brought `taken`."""
        self._speed.learn(taken, self._costs[drafted])


@dataclass(frozen=True)
class Place:
    """Where a draft is copied from: the index of its first token among the row's, and the length of the match."""

    start: int
    match: int


class LookupDrafter:
    """Drafts what followed the last tokens of the row, prompt included, where they stood before.

    costs, speed: see `Worth`. row: its tokens so far.
    """

    def __init__(self, costs: Sequence[float], row: Sequence[int], speed: Speed | None = None) -> None:
        self._worth = Worth(costs, speed or Speed())
        self._chances = Chances(FIRST_CHANCES)
        self._tokens: list[int] = []
        self._last: dict[tuple[int, int], int] = {}  # the index behind the last occurrence of two tokens
        self._earlier: list[int] = []  # by such an index, that of the occurrence before; 0 for none
        self._place: Place | None = None
        self._draft: list[int] = []
        self._changed: int | None = None  # where the copy was when the row departed from it
        self._since = 0  # steps since then
        self.follow(row)

    def draft(self, most: int) -> Sequence[int]:
        """See `Drafter`."""
        self._place, self._draft = self._find(), []
        if self._place is not None:
            kinds = self._kinds(self._place, min(most, self._worth.longest))
            length = self._worth.length(self._chances.of(kind) for kind in kinds)
            tokens, start = self._tokens, self._place.start
            for index in range(start, start + length):  # the copy may reach into itself
                self._draft.append(tokens[index] if index < len(tokens) else self._draft[index - len(tokens)])
        return self._draft

    def take(self, tokens: Sequence[int]) -> None:
        """See `Drafter`."""
        draft, place = self._draft, self._place
        right = matching(draft, tokens)
        self._since += 1
        if place is not None and draft:
            for count, kind in enumerate(self._kinds(place, min(right + 1, len(draft)))):
                self._chances.learn(kind, count < right)
            self._changed, self._since = place.start + right, 0
        self._worth.learn(len(draft), len(tokens))
        self.follow(tokens)

    def follow(self, tokens: Sequence[int]) -> None:
        """Take notice of tokens that came without a draft from here."""
        for token in tokens:
            self._add(token)

    def _add(self, token: int) -> None:
        self._tokens.append(token)
        end = len(self._tokens)
        if end > 1:
            pair = (self._tokens[-2], token)
            self._earlier.append(self._last.get(pair, 0))
            self._last[pair] = end
        else:
            self._earlier.append(0)

    def _find(self) -> Place | None:
        """Return the place of the longest match, of equal ones the last, unless a copy that was left goes on nearby."""
        longest = self._longest_match()
        if longest is not None and longest.match > 2:
            return longest
        tokens = self._tokens
        if self._changed is not None and self._since < PATIENCE:
            for index in range(self._changed, min(self._changed + NEAR, len(tokens) - 1)):
                if tokens[index] == tokens[-1]:
                    return Place(index + 1, 0)
        return longest

    def _longest_match(self) -> Place | None:
        tokens = self._tokens
        end, best = len(tokens), None
        other = self._earlier[end - 1] if tokens else 0
        for _ in range(PLACES):
            if not other:
                break
            match = 2
            while match < min(LONGEST, other) and tokens[other - 1 - match] == tokens[end - 1 - match]:
                match += 1
            if best is None or match > best.match:
                best = Place(other, match)
            if match == LONGEST:
                break
            other = self._earlier[other - 1]
        return best

    @staticmethod
    def _kinds(place: Place, count: int) -> list[int]:
        """Return the kind of each of the first `count` tokens drafted from a place: a match grows with each."""
        kinds = [_KINDS[min(place.match + index, LONGEST)] for index in range(count)]
        return kinds if place.match or not kinds else [0, *kinds[1:]]
