"""The choice of the next token from the logits of a row.

The order of the steps and what each keeps are transformers' own (logit bias, repetition penalty, temperature, top-k,
top-p, min-p), with OpenAI's presence and frequency penalties before the temperature. They are written anew because
transformers sorts all 262144 logits of a Gemma for every token; here only the most likely candidates are sorted.
"""

import random
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import numpy as np

from gemma_awq_cli.generate.sampling import Sampling, row_seed
from gemma_awq_cli.models.forward.session import Logits, Tokens

COLDEST = 1e-30  # a lower temperature would turn float32 logits into infinities
# A nucleus nearly always lies within the first of these numbers of tokens, or else within the second. If it does not,
# all are sorted.
FIRST_CANDIDATES, MORE_CANDIDATES = 1024, 16384
_LEAST = float(np.finfo(np.float32).tiny)  # of a nucleus: the likeliest token is always in it
MOST_LEADING = 1024  # of a row's largest logits that a session is asked for
FOLDS = 64  # into which a vocabulary is folded to find a bound of its largest scores

Largest = tuple[Logits, Tokens]  # numbers [C] in descending order, equal ones by token, and their tokens [C]


class Constraint(Protocol):
    """What a row's tokens must follow, such as a grammar."""

    def mask(self, logits: Logits) -> Logits:
        """Return logits [V] with -inf for every token that must not come next, and the others unchanged."""
        ...

    def take(self, token: int) -> None:
        """Follow the token that was chosen."""
        ...


class Sampler:
    """Samples the tokens of one row.

    Each row has its own random numbers, so that its tokens do not depend on the other rows of the batch. row: the
    number that tells its random numbers from those of other rows; prompt: its token ids, for the repetition penalty.
    constraint: None lets every token come next.
    """

    def __init__(
        self, sampling: Sampling, row: int, prompt: Sequence[int], constraint: Constraint | None = None
    ) -> None:
        self._sampling = sampling
        self._constraint = constraint
        self._seen = set(prompt)
        self._generated: Counter[int] = Counter()
        self._random = random.Random(None if sampling.seed is None else row_seed(sampling.seed, row))

    def sample(self, logits: Logits, leading: Largest | None = None) -> int:
        """Return the next token of the row from its logits [V] float32, which stay as they are.

        leading: their `self.leading` largest or more, if they are known, as `largest` returns them.
        """
        token = self._draw(self._adjusted(logits), leading if self.leading else None)
        self.take(token)
        return token

    @property
    def leading(self) -> int:
        """From how many of the largest logits the next token is chosen, whatever came before; 0 if others count too."""
        sampling = self._sampling
        changed = sampling.logit_bias or sampling.repetition_penalty
        changed = changed or sampling.presence_penalty or sampling.frequency_penalty
        if changed or self._constraint is not None:
            return 0
        count = 1 if sampling.greedy else sampling.top_k or 0
        return count if count <= MOST_LEADING else 0

    @property
    def takes_likeliest(self) -> bool:
        """Whether the next token is the one with the largest logit, whatever came before."""
        return self._sampling.greedy and self.leading == 1

    def take(self, token: int) -> None:
        """Take notice of the row's next token."""
        self._seen.add(token)
        self._generated[token] += 1
        if self._constraint is not None:
            self._constraint.take(token)

    def _adjusted(self, logits: Logits) -> Logits:
        """Return the logits after everything that adds to them or forbids tokens."""
        sampling = self._sampling
        if sampling.logit_bias:
            logits = biased(logits, sampling.logit_bias)
        if sampling.repetition_penalty:
            logits = penalized(logits, self._seen, sampling.repetition_penalty)
        if self._generated and (sampling.presence_penalty or sampling.frequency_penalty):
            logits = reduced(logits, self._generated, sampling.presence_penalty, sampling.frequency_penalty)
        return logits if self._constraint is None else self._constraint.mask(logits)

    def _draw(self, logits: Logits, leading: Largest | None) -> int:
        if self._sampling.greedy:
            return int(logits.argmax() if leading is None else leading[1][0])
        weights, tokens = distribution(logits, self._sampling, leading)
        sums = weights.cumsum(dtype=np.float64)
        point = self._random.random() * sums[-1]
        place = min(int(np.searchsorted(sums, point, side="right")), len(sums) - 1)
        return place if tokens is None else int(tokens[place])


def largest(scores: Logits, count: int) -> Largest:
    """Return the `count` largest scores in descending order, all if there are fewer, and their tokens."""
    count = min(count, len(scores))
    columns = len(scores) // FOLDS
    likely: Tokens | None = None
    if columns >= 2 * count > 0:
        # `count` columns have a maximum of this or more, so that none of the largest scores is below it
        least = np.partition(scores[: FOLDS * columns].reshape(FOLDS, columns).max(0), -count)[-count]
        likely = np.flatnonzero(scores >= least)
    elif 0 < count < len(scores):
        likely = np.flatnonzero(scores >= np.partition(scores, -count)[-count])
    found = scores if likely is None else scores[likely]
    places = np.argsort(-found, kind="stable")[:count]
    return found[places], places if likely is None else likely[places]


def biased(logits: Logits, bias: Sequence[tuple[int, float]]) -> Logits:
    """Return logits [V] with numbers added to those of some tokens."""
    tokens, numbers = zip(*bias, strict=True)
    added = logits.copy()
    np.add.at(added, list(tokens), np.asarray(numbers, added.dtype))
    return added


def reduced(logits: Logits, counts: Mapping[int, int], presence: float, frequency: float) -> Logits:
    """Return logits [V], lowered by presence + count * frequency for each token that was generated `count` times.

    The formula of OpenAI's API reference; tokens of the prompt do not count.
    """
    return biased(logits, [(token, -presence - count * frequency) for token, count in counts.items()])


def penalized(logits: Logits, previous: Collection[int], penalty: float) -> Logits:
    """Return logits [V] in which those of the `previous` tokens are lowered (CTRL, arXiv:1909.05858)."""
    seen = np.fromiter(previous, np.int64, len(previous))
    lowered = logits.copy()
    score = logits[seen]
    lowered[seen] = np.where(score < 0, score * np.float32(penalty), score / np.float32(penalty))
    return lowered


def distribution(logits: Logits, sampling: Sampling, leading: Largest | None = None) -> tuple[Logits, Tokens | None]:
    """Return the weights [C] of the candidate tokens, which need not sum to 1, and their token ids [C].

    logits: [V] float32; leading: their top_k largest or more, if they are known and there is a top_k. The ids are None
    if every token of the vocabulary is a candidate, in order.
    """
    top_p = sampling.top_p if sampling.top_p is not None and sampling.top_p < 1 else None
    if sampling.top_k:
        found, tokens = leading or largest(logits, sampling.top_k)
        found, tokens = found[: sampling.top_k], tokens[: sampling.top_k]
        weights = softmax(tempered(found, sampling))
    elif top_p is not None or sampling.min_p:
        scores = tempered(logits, sampling)
        total = logsumexp(scores)
        for count in (FIRST_CANDIDATES, MORE_CANDIDATES, len(scores)):
            found, tokens = largest(scores, count)
            weights = np.exp(found - total)
            # weight that these candidates do not have may lie anywhere in the rest of the vocabulary
            covered = weights.sum() >= top_p if top_p is not None else weights[-1] < (sampling.min_p or 0) * weights[0]
            if covered:
                break
    else:
        return softmax(tempered(logits, sampling)), None
    if top_p is not None:  # a token stays if the likelier ones together do not reach top_p
        before = weights.cumsum() - weights
        weights = np.where(before < max(top_p, _LEAST), weights, np.float32(0))
    if sampling.min_p:
        weights = np.where(weights >= sampling.min_p * weights[0], weights, np.float32(0))
    return weights, tokens


def tempered(logits: Logits, sampling: Sampling) -> Logits:
    """Return logits, of which the largest is one, at the sampling's temperature."""
    temperature = sampling.temperature or 1.0
    if temperature >= COLDEST:
        return logits / np.float32(temperature)
    return (logits - logits.max()) / np.float32(COLDEST)


def softmax(scores: Logits) -> Logits:
    """Return the probabilities [C] that belong to scores [C]."""
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def logsumexp(scores: Logits) -> np.float32:
    """Return the logarithm of the sum of the exponentials of scores [C]."""
    largest_score = scores.max()
    return np.float32(largest_score + np.log(np.exp(scores - largest_score).sum()))
