"""The log probabilities that a model gives to continuations, computed in batches that read a common beginning once.

Few-shot questions share their examples, and the answers to one question share all of it; sorted, such rows are
neighbours. Answers of one token to the same question are one row.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import numpy as np

from gemma_awq_cli.generate.local_engine import require_finite_logits
from gemma_awq_cli.generate.sampler import logsumexp
from gemma_awq_cli.models.forward.loading import OpenModel
from gemma_awq_cli.models.forward.session import Logits

MAX_ROWS = 32  # per batch
MAX_TOKENS = 4096  # of all rows of a batch together, shared ones counted for each row: bounds the KV cache
MAX_LOGITS = 256  # positions whose logits are held at a time; Gemma's take 1 MB per position
MIN_SHARED = 8  # tokens that are worth a forward pass of their own


@dataclass(frozen=True)
class Continuation:
    """Tokens [C] after a context [P] that begins with BOS; neither is empty."""

    context: Sequence[int]
    tokens: Sequence[int]


@dataclass
class _Row:
    """What the model reads: a context and all tokens of a continuation but the last.

    ends: for each continuation that ends here its number, its length in tokens, and its last token.
    """

    ids: tuple[int, ...]
    ends: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def count(self) -> int:
        """How many of the last positions need logits."""
        return max(length for _, length, _ in self.ends)


def score(
    opened: OpenModel, continuations: Sequence[Continuation], on_done: Callable[[int], None]
) -> list[tuple[float, bool]]:
    """Return the log probability of each continuation in nats, and whether greedy decoding would give it.

    on_done: hears how many continuations each batch has scored.
    """
    rows: dict[tuple[int, ...], _Row] = {}
    for number, continuation in enumerate(continuations):
        ids = (*continuation.context, *continuation.tokens[:-1])
        rows.setdefault(ids, _Row(ids)).ends.append((number, len(continuation.tokens), continuation.tokens[-1]))
    results: list[tuple[float, bool]] = [(0.0, False)] * len(continuations)
    for batch in _batches(sorted(rows.values(), key=lambda row: row.ids)):
        for row, scorer in zip(batch, _read(opened, batch), strict=True):
            for number, length, last in row.ends:
                results[number] = scorer.score(length, last)
        on_done(sum(len(row.ends) for row in batch))
    return results


def _batches(rows: Sequence[_Row]) -> Iterator[list[_Row]]:
    """Batches of neighbours within the limits. A row that exceeds a limit alone is a batch of its own."""
    batch: list[_Row] = []
    longest = counts = 0
    for row in rows:
        longest, counts = max(longest, len(row.ids)), counts + row.count
        size = len(batch) + 1
        if batch and (size > MAX_ROWS or size * longest > MAX_TOKENS or counts > MAX_LOGITS):
            yield batch
            batch, longest, counts = [], len(row.ids), row.count
        batch.append(row)
    if batch:
        yield batch


class _RowScorer:
    """Scores the continuations of a row from the logits at its last positions, which arrive in order."""

    def __init__(self, row: _Row) -> None:
        self._ids = row.ids
        self._at = len(row.ids) - row.count
        self._log_probabilities: list[float] = []  # of the row's own next token, at all positions but the last
        self._best: list[bool] = []  # whether that token is the most likely one
        self._end = np.empty(0, np.float32)  # log probabilities [V] after the last position

    def add(self, logits: Logits) -> None:
        """Take the logits [n, V] at the next n positions."""
        require_finite_logits(logits)
        totals = np.array([logsumexp(row) for row in logits])
        following = np.array(self._ids[self._at + 1 : self._at + 1 + len(logits)], np.int64)
        known = logits[: len(following)]
        picked = known[np.arange(len(following)), following] - totals[: len(following)]
        self._log_probabilities += picked.tolist()
        self._best += (known.argmax(1) == following).tolist()
        self._at += len(logits)
        if len(following) < len(logits):
            self._end = logits[-1] - totals[-1]

    def score(self, length: int, last: int) -> tuple[float, bool]:
        """Return log probability and greediness of the row's last `length - 1` tokens followed by `last`."""
        first = len(self._best) - (length - 1)
        total = sum(self._log_probabilities[first:]) + float(self._end[last])
        return total, all(self._best[first:]) and int(self._end.argmax()) == last


def _read(opened: OpenModel, batch: Sequence[_Row]) -> list[_RowScorer]:
    """Run the model over a batch. Returns a scorer for each row."""
    scorers = [_RowScorer(row) for row in batch]
    capacity = max(len(row.ids) for row in batch)
    if len(batch) == 1:  # perhaps a long one: first its context, then the positions that need logits, some at a time
        (row,) = batch
        session = opened.session(1, capacity)
        first = len(row.ids) - row.count
        if first:
            session.next_logits([row.ids[:first]])
        for at in range(first, len(row.ids), MAX_LOGITS):
            piece = row.ids[at : at + MAX_LOGITS]
            scorers[0].add(session.last_logits([piece], [len(piece)]))
        return scorers
    pairs = zip(batch[0].ids, batch[-1].ids, strict=False)  # sorted: what first and last share, all share
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    shared = min([shared, *(len(row.ids) - row.count for row in batch)])
    if shared >= MIN_SHARED:
        session = opened.session(1, capacity)
        session.next_logits([batch[0].ids[:shared]])
        session.repeat_row(len(batch))
    else:
        shared, session = 0, opened.session(len(batch), capacity)
    counts = [row.count for row in batch]
    logits = session.last_logits([row.ids[shared:] for row in batch], counts)
    for part, scorer in zip(np.split(logits, np.cumsum(counts)[:-1]), scorers, strict=True):
        scorer.add(part)
    return scorers
