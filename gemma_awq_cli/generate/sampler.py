"""The choice of the next token from the logits of a row.

The order of the steps and what each keeps are transformers' own (logit bias, repetition penalty, temperature, top-k,
top-p, min-p), with OpenAI's presence and frequency penalties before the temperature. They are written anew because
transformers sorts all 262144 logits of a Gemma for every token; here only the most likely candidates are sorted.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from gemma_awq_cli.generate.sampling import Sampling, row_seed

COLDEST = 1e-30  # a lower temperature would turn float32 logits into infinities
FIRST_CANDIDATES = 1024  # a nucleus nearly always lies within this many tokens; if it does not, all are sorted
FOLDS = 64  # into which a vocabulary is folded to find a bound of its largest scores


class Constraint(Protocol):
    """What a row's tokens must follow, such as a grammar."""

    def mask(self, logits: Tensor) -> Tensor:
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
        self._generator = torch.Generator("cpu")
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(row_seed(sampling.seed, row))

    def sample(self, logits: Tensor) -> int:
        """Return the next token of the row from its logits [V] float32."""
        token = self._draw(self._adjusted(logits))
        self._seen.add(token)
        self._generated[token] += 1
        if self._constraint is not None:
            self._constraint.take(token)
        return token

    def _adjusted(self, logits: Tensor) -> Tensor:
        """Return the logits after everything that adds to them or forbids tokens."""
        sampling = self._sampling
        if sampling.logit_bias:
            logits = biased(logits, sampling.logit_bias)
        if sampling.repetition_penalty:
            logits = penalized(logits, self._seen, sampling.repetition_penalty)
        if self._generated and (sampling.presence_penalty or sampling.frequency_penalty):
            logits = reduced(logits, self._generated, sampling.presence_penalty, sampling.frequency_penalty)
        return logits if self._constraint is None else self._constraint.mask(logits)

    def _draw(self, logits: Tensor) -> int:
        if self._sampling.greedy:
            # several times as fast as torch's for a whole vocabulary
            return int(logits.numpy().argmax() if logits.device.type == "cpu" else logits.argmax())
        probabilities, tokens = distribution(logits, self._sampling)
        sums = probabilities.to("cpu", torch.float64).cumsum(0)
        point = torch.rand(1, generator=self._generator, dtype=torch.float64) * sums[-1]
        place = min(int(torch.searchsorted(sums, point, right=True)), len(sums) - 1)
        return place if tokens is None else int(tokens[place])


def largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` largest scores in descending order, all if there are fewer, and their tokens.

    As `Tensor.topk`, which on a CPU takes several times as long for a whole vocabulary.
    """
    columns = len(scores) // FOLDS
    if scores.device.type != "cpu" or columns < 2 * count:
        return scores.topk(min(count, len(scores)))
    values = scores.numpy()
    # `count` columns have a maximum of this or more, so that none of the largest scores is below it
    least = np.partition(values[: FOLDS * columns].reshape(FOLDS, columns).max(0), -count)[-count]
    likely = torch.from_numpy(np.flatnonzero(values >= least))
    found, places = scores[likely].topk(count)
    return found, likely[places]


def biased(logits: Tensor, bias: Sequence[tuple[int, float]]) -> Tensor:
    """Return logits [V] with numbers added to those of some tokens."""
    tokens, numbers = zip(*bias, strict=True)
    index = torch.tensor(tokens, dtype=torch.int64, device=logits.device)
    return logits.index_add(0, index, torch.tensor(numbers, dtype=logits.dtype, device=logits.device))


def reduced(logits: Tensor, counts: Mapping[int, int], presence: float, frequency: float) -> Tensor:
    """Return logits [V], lowered by presence + count * frequency for each token that was generated `count` times.

    The formula of OpenAI's API reference; tokens of the prompt do not count.
    """
    return biased(logits, [(token, -presence - count * frequency) for token, count in counts.items()])


def penalized(logits: Tensor, previous: Collection[int], penalty: float) -> Tensor:
    """Return logits [V] in which those of the `previous` tokens are lowered (CTRL, arXiv:1909.05858)."""
    seen = torch.tensor(sorted(previous), dtype=torch.int64, device=logits.device)
    score = logits[seen]
    return logits.index_put((seen,), torch.where(score < 0, score * penalty, score / penalty))


def distribution(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """Return the weights [C] of the candidate tokens, which need not sum to 1, and their token ids [C].

    logits: [V] float32. The ids are None if every token of the vocabulary is a candidate, in order.
    """
    top_p = sampling.top_p if sampling.top_p is not None and sampling.top_p < 1 else None
    if sampling.top_k:
        found, tokens = largest(logits, sampling.top_k)
        weights = tempered(found, sampling).softmax(0)
    elif top_p is not None or sampling.min_p:
        scores = tempered(logits, sampling)
        total = scores.logsumexp(0)
        found, tokens = largest(scores, FIRST_CANDIDATES)
        weights = (found - total).exp()
        # weight that the first candidates do not have may lie anywhere in the rest of the vocabulary
        covered = weights.sum() >= top_p if top_p is not None else weights[-1] < (sampling.min_p or 0) * weights[0]
        if not covered:
            found, tokens = scores.sort(descending=True)
            weights = (found - total).exp()
    else:
        return tempered(logits, sampling).softmax(0), None
    if top_p is not None:  # a token stays if the likelier ones together do not reach top_p
        before = weights.cumsum(0) - weights
        weights = torch.where(before < max(top_p, torch.finfo(torch.float32).tiny), weights, 0)
    if sampling.min_p:
        weights = torch.where(weights >= sampling.min_p * weights[0], weights, 0)
    return weights, tokens


def tempered(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return logits, of which the largest is one, at the sampling's temperature."""
    temperature = sampling.temperature or 1.0
    return logits / temperature if temperature >= COLDEST else (logits - logits.max()) / COLDEST
