"""Drafts by another model of the same tokenizer: the most likely tokens of one that reads them faster.

The other model reads each row as far as the first does and keeps its cache from row to row, as a chat needs.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from gemma_awq_cli.generate.drafting import Chances, Drafter, LookupDrafter, Speed, Worth, matching
from gemma_awq_cli.models.forward.cached_session import CachedSession
from gemma_awq_cli.models.forward.session import Logits, Session

ROOM = 512  # the least room, in tokens, of its session
SURE = 3  # tokens of a draft from the row itself from which on the model is not asked
TRIES = 8  # drafts before it is judged whether they pay
FIRST_PAUSE, LONGEST_PAUSE = 16, 256  # steps without drafts where they do not pay
BINS = 10  # of the probability that the drafting model gives its token

# A first guess at the chance that a token is right, by the bin of its probability: that probability.
FIRST_CHANCES = {number: (number + 0.5) / BINS for number in range(BINS)}


class ModelDrafts:
    """Begins the drafts of rows by a model: a `BeginDraft`.

    open_session: of the drafting model, as `OpenModel.session`. vocabulary: of which ids both models know the logits.
    cost: of one token of it, in readings of one token by the model that checks. context: the most tokens that it reads.
    """

    def __init__(self, open_session: Callable[[int, int], Session], vocabulary: int, cost: float, context: int) -> None:
        self._open_session = open_session
        self._vocabulary = vocabulary
        self._cost = cost
        self._context = context
        self._kept: Reader | None = None

    def __call__(self, tokens: Sequence[int], most: int, session: CachedSession) -> Drafter | None:
        """See `BeginDraft`."""
        if most > self._context or max(tokens) >= self._vocabulary:
            return None
        if self._kept is None or self._kept.capacity < most:
            capacity = min(self._context, max(2 * most, ROOM))
            self._kept = None  # before there is another
            drafting = self._open_session(1, capacity)
            assert isinstance(drafting, CachedSession), "others are refused when they are opened"
            self._kept = Reader(drafting, capacity, self._vocabulary)
        speed, costs = Speed(), session.reading_costs
        with_drafting = [cost + count * self._cost for count, cost in enumerate(costs)]
        model = ModelDrafter(self._kept, with_drafting, tokens, speed)
        return BothDrafter(LookupDrafter(costs, tokens, speed), model)


class Reader:
    """A session of the drafting model and the ids that it has read. capacity: its room in tokens."""

    def __init__(self, session: CachedSession, capacity: int, vocabulary: int) -> None:
        self._session = session
        self._read: list[int] = []
        self._vocabulary = vocabulary
        self.capacity = capacity

    def logits(self, ids: Sequence[int]) -> Logits:
        """Return the logits [vocabulary] that follow a row of ids; only what was not read before is read."""
        common = matching(self._read, ids[:-1])
        if common < len(self._read):
            del self._read[self._session.shorten_row(0, common) :]
        unread = list(ids[len(self._read) :])
        logits: Logits = self._session.next_logits([unread])[0, : self._vocabulary]
        self._read += unread
        return logits


class ModelDrafter:
    """A `Drafter` of one row by another model. costs, speed: see `Worth`; with what the drafting itself costs.

    waits: for how many steps there are no drafts, because the last ones did not pay.
    """

    def __init__(self, reader: Reader, costs: Sequence[float], row: Sequence[int], speed: Speed) -> None:
        self._reader = reader
        self._worth = Worth(costs, speed)
        self._speed = speed
        self._chances = Chances(FIRST_CHANCES)
        self._tokens = list(row)
        self._draft: list[int] = []
        self._kinds: list[int] = []
        self._drafts = 0
        self._pause = FIRST_PAUSE
        self.waits = 0

    def draft(self, most: int) -> Sequence[int]:
        """See `Drafter`."""
        self._draft, self._kinds = [], []
        most = min(most, self._worth.longest)
        if self.waits or not most:
            return self._draft
        whole = 1.0
        for token, kind in self._likely():
            self._draft.append(token)
            self._kinds.append(kind)
            whole *= self._chances.of(kind)
            if len(self._draft) == most or not self._worth.may_gain(whole, len(self._draft)):
                break
        return self._draft

    def _likely(self) -> Iterator[tuple[int, int]]:
        """Yield the drafting model's most likely tokens one after the other, and the bins of their probabilities."""
        while True:
            logits = self._reader.logits([*self._tokens, *self._draft])
            token = int(logits.argmax())
            probability = 1 / float(np.exp(logits - logits[token]).sum())
            yield token, min(BINS - 1, int(probability * BINS))

    def take(self, tokens: Sequence[int]) -> None:
        """See `Drafter`."""
        right = matching(self._draft, tokens)
        for count, kind in enumerate(self._kinds[: min(right + 1, len(self._draft))]):
            self._chances.learn(kind, count < right)
        self._worth.learn(len(self._draft), len(tokens))
        self._drafts += bool(self._draft)
        self.follow(tokens)
        if self._draft and self._speed.value >= 1:
            self._pause = FIRST_PAUSE
        elif self._draft and self._drafts >= TRIES:
            self.waits = self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def follow(self, tokens: Sequence[int]) -> None:
        """Take notice of tokens that came without a draft from here."""
        self.waits = max(0, self.waits - len(tokens))
        self._tokens += tokens


class BothDrafter:
    """A `Drafter` that takes what the row itself has if it is sure of it, which costs nothing, or else asks a model."""

    def __init__(self, lookup: LookupDrafter, model: ModelDrafter) -> None:
        self._lookup = lookup
        self._model = model
        self._asked = False  # whether the draft is the model's

    def draft(self, most: int) -> Sequence[int]:
        """See `Drafter`."""
        draft = self._lookup.draft(most)
        self._asked = len(draft) < SURE and not self._model.waits
        return self._model.draft(most) if self._asked else draft

    def take(self, tokens: Sequence[int]) -> None:
        """See `Drafter`."""
        drafted, other = (self._model, self._lookup) if self._asked else (self._lookup, self._model)
        drafted.take(tokens)
        other.follow(tokens)
