"""How likely a model finds given continuations: in batches, and what neighbouring rows begin with is read once.

Few-shot questions share their examples, and the answers to one question all of it; sorted, such rows lie side by side.
Answers of one token to the same question are one row.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import torch
from torch import Tensor

from gemma_awq_cli.generate.local_engine import require_finite_logits
from gemma_awq_cli.models.forward.loading import OpenModel

MAX_ROWS = 32  # of a batch
MAX_TOKENS = 4096  # of all rows of a batch together, shared ones counted for each: what bounds the cache
MAX_LOGITS = 256  # positions whose logits are held at a time: of a Gemma a MB each
MIN_SHARED = 8  # tokens that are worth a forward of their own


@dataclass(frozen=True)
class Continuation:
    """Tokens [C] after a context [P] that begins with BOS; none of the two is empty."""

    context: Sequence[int]
    tokens: Sequence[int]


@dataclass
class _Row:
    """What is fed: a context and all tokens of a continuation but the last.

    ends: of each continuation that ends here its number, how many tokens it has, and the last of them.
    """

    ids: tuple[int, ...]
    ends: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def count(self) -> int:
        """How many of the last positions are looked at."""
        return max(length for _, length, _ in self.ends)


@torch.inference_mode()
def score(
    opened: OpenModel, continuations: Sequence[Continuation], on_done: Callable[[int], None]
) -> list[tuple[float, bool]]:
    """Of each continuation its log probability in nats, and whether greedy decoding would give it.

    on_done: told how many continuations a batch has scored.
    """
    rows: dict[tuple[int, ...], _Row] = {}
    for number, continuation in enumerate(continuations):
        ids = (*continuation.context, *continuation.tokens[:-1])
        rows.setdefault(ids, _Row(ids)).ends.append((number, len(continuation.tokens), continuation.tokens[-1]))
    results: list[tuple[float, bool]] = [(0.0, False)] * len(continuations)
    for batch in _batches(sorted(rows.values(), key=lambda row: row.ids)):
        for row, seen in zip(batch, _read(opened, batch), strict=True):
            for number, length, last in row.ends:
                results[number] = seen.of(length, last)
        on_done(sum(len(row.ends) for row in batch))
    return results


def _batches(rows: Sequence[_Row]) -> Iterator[list[_Row]]:
    """Neighbours that pass together. A row that alone exceeds a bound is a batch of its own."""
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


class _Seen:
    """What the logits at a row's last positions say, as they arrive in order: [n, V] at a time."""

    def __init__(self, row: _Row) -> None:
        self._ids = row.ids
        self._at = len(row.ids) - row.count
        self._log_probabilities: list[float] = []  # of the row's own next token, at all positions but the last
        self._best: list[bool] = []
        self._end = torch.empty(0)  # log probabilities [V] after the last position

    def add(self, logits: Tensor) -> None:
        require_finite_logits(logits)
        totals = logits.logsumexp(1)
        following = torch.tensor(self._ids[self._at + 1 : self._at + 1 + len(logits)], device=logits.device)
        known = logits[: len(following)]
        picked = known.gather(1, following[:, None])[:, 0] - totals[: len(following)]
        self._log_probabilities += picked.tolist()
        self._best += (known.argmax(1) == following).tolist()
        self._at += len(logits)
        if len(following) < len(logits):
            self._end = logits[-1] - totals[-1]

    def of(self, length: int, last: int) -> tuple[float, bool]:
        """Log probability and greediness of the row's last `length - 1` tokens and `last` after them."""
        first = len(self._best) - (length - 1)
        total = sum(self._log_probabilities[first:]) + float(self._end[last])
        return total, all(self._best[first:]) and int(self._end.argmax()) == last


def _read(opened: OpenModel, batch: Sequence[_Row]) -> list[_Seen]:
    seen = [_Seen(row) for row in batch]
    capacity = max(len(row.ids) for row in batch)
    if len(batch) == 1:  # perhaps a long one: its context, then the positions that count a few at a time
        (row,) = batch
        session = opened.session(1, capacity)
        first = len(row.ids) - row.count
        if first:
            session.next_logits([row.ids[:first]])
        for at in range(first, len(row.ids), MAX_LOGITS):
            piece = row.ids[at : at + MAX_LOGITS]
            seen[0].add(session.last_logits([piece], [len(piece)]))
        return seen
    pairs = zip(batch[0].ids, batch[-1].ids, strict=False)  # of sorted rows: what these two share, all do
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
    for part, one in zip(logits.split(counts), seen, strict=True):
        one.add(part)
    return seen
