"""How the next token is chosen: as the model's generation_config says, unless the user asks otherwise.

The order of the steps and what each keeps are transformers' own (repetition penalty, temperature, top-k, top-p, min-p);
they are written anew because transformers sorts all 262144 logits of a Gemma for every token, here only the candidates.
"""

import hashlib
import math
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gemma_awq_cli.errors import GemmaAwqError, UsageError

CORRECT = "Correct it, or take the original model's file."
COLDEST = 1e-30  # below it a temperature makes infinities of float32 logits
FIRST_CANDIDATES = 1024  # a nucleus lies within so many tokens nearly always; if not, all are sorted


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: greedily unless a temperature, top_k or top_p is given.

    Nobody asks for min_p or repetition_penalty on the command line; a model's generation_config may.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 or (self.temperature is None and self.top_k is None and self.top_p is None)

    def described(self) -> str:
        """For a note: `temperature 0.8, top-p 0.95, seed 7`."""
        penalty = [f"repetition penalty {self.repetition_penalty:g}"] if self.repetition_penalty else []
        if self.greedy:
            return ", ".join(["greedy", *penalty])
        parts = [f"temperature {1.0 if self.temperature is None else self.temperature:g}"]
        parts += [f"top-k {self.top_k}"] if self.top_k else []
        parts += [f"top-p {self.top_p:g}"] if self.top_p is not None else []
        parts += [f"min-p {self.min_p:g}"] if self.min_p else []
        return ", ".join([*parts, *penalty, f"seed {self.seed}"])


def resolve(asked: Sampling, declared: Mapping[str, Any]) -> Sampling:
    """What the user asked for, completed by the model's generation_config.

    `declared` decides whether to sample if the user gives no temperature, top_k or top_p, and fills in what was left
    open. A sampling without a seed gets one, so that it can be said and repeated.
    """
    for option, value in (("--temperature", asked.temperature), ("--top-p", asked.top_p)):
        if value is not None and not math.isfinite(value):
            raise UsageError(f"{option} {value} is not a finite number.")
    said = {name: _number(declared, name) for name in _DECLARED}
    samples = _samples(declared)
    penalty = None if said["repetition_penalty"] == 1 else said["repetition_penalty"]
    if asked.temperature == 0 or (asked.greedy and not samples):
        return Sampling(temperature=0.0, repetition_penalty=penalty)
    top_k = _first(asked.top_k, said["top_k"])
    given = Sampling(
        temperature=_first(asked.temperature, said["temperature"], 1.0),
        top_k=int(top_k) if top_k else None,  # 0 switches it off
        top_p=_first(asked.top_p, said["top_p"]),
        min_p=said["min_p"] or None,
        repetition_penalty=penalty,
        seed=asked.seed if asked.seed is not None else secrets.randbelow(2**32),
    )
    return replace(given, seed=None) if given.temperature == 0 else given


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)


# What a generation_config may say: the type and the bounds, the last of them included. 0 is `off` for some.
_DECLARED: dict[str, tuple[type, float, float]] = {
    "temperature": (float, 0, 1e6), "top_k": (int, 0, 2**31), "top_p": (float, 0, 1), "min_p": (float, 0, 1),
    "repetition_penalty": (float, 1e-6, 1e6),
}  # fmt: skip


def _number(declared: Mapping[str, Any], name: str) -> float | None:
    value = declared.get(name)
    if value is None:
        return None
    kind, least, most = _DECLARED[name]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not least <= value <= most or (kind is int and value != int(value)):
        sort = "an integer" if kind is int else "a number"
        raise GemmaAwqError(
            f"The model's generation_config.json has the {name} {repr(value)[:80]}, which is not {sort} from {least:g} "
            f"to {most:.0f}.",
            CORRECT,
        )
    return value


def _samples(declared: Mapping[str, Any]) -> bool:
    value = declared.get("do_sample")
    if value is not None and not isinstance(value, bool):
        raise GemmaAwqError(
            f"The model's generation_config.json has the do_sample {repr(value)[:80]}, not true or false.",
            CORRECT,
        )
    return bool(value)


def row_seed(seed: int, row: int) -> int:
    """A seed of 63 bits for one row of a run: another for each row, and another for each run's seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{row}".encode()).digest()[:8], "big") >> 1


class Chooser:
    """Chooses one row's tokens. Each row has its own random numbers: what else is in its batch does not matter."""

    def __init__(self, sampling: Sampling, row: int, prompt: Sequence[int]) -> None:
        self._sampling = sampling
        self._seen = set(prompt)
        self._generator = torch.Generator("cpu")
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(row_seed(sampling.seed, row))

    def choose(self, logits: Tensor) -> int:
        """The row's next token from logits [V] float32."""
        if self._sampling.repetition_penalty:
            logits = penalized(logits, self._seen, self._sampling.repetition_penalty)
        token = self._draw(logits)
        self._seen.add(token)
        return token

    def _draw(self, logits: Tensor) -> int:
        if self._sampling.greedy:
            return int(logits.argmax())
        probabilities, tokens = distribution(logits, self._sampling)
        sums = probabilities.to("cpu", torch.float64).cumsum(0)
        point = torch.rand(1, generator=self._generator, dtype=torch.float64) * sums[-1]
        place = min(int(torch.searchsorted(sums, point, right=True)), len(sums) - 1)
        return place if tokens is None else int(tokens[place])


def penalized(logits: Tensor, previous: Collection[int], penalty: float) -> Tensor:
    """Logits [V] with those of the tokens that occurred made smaller (CTRL, arXiv:1909.05858)."""
    seen = torch.tensor(sorted(previous), dtype=torch.int64, device=logits.device)
    score = logits[seen]
    return logits.index_put((seen,), torch.where(score < 0, score * penalty, score / penalty))


def distribution(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """Logits [V] -> weights [C] (they need not sum to 1) and the tokens [C] they are of; None: all in order."""
    temperature = sampling.temperature or 1.0
    scores = logits / temperature if temperature >= COLDEST else (logits - logits.max()) / COLDEST
    top_p = sampling.top_p if sampling.top_p is not None and sampling.top_p < 1 else None
    if sampling.top_k:
        scores, tokens = scores.topk(min(sampling.top_k, len(scores)))
        weights = scores.softmax(0)
    elif top_p is not None or sampling.min_p:
        total = scores.logsumexp(0)
        found, tokens = scores.topk(min(FIRST_CANDIDATES, len(scores)))
        weights = (found - total).exp()
        # whatever the first candidates lack, the rest of the vocabulary may hold
        covered = weights.sum() >= top_p if top_p is not None else weights[-1] < (sampling.min_p or 0) * weights[0]
        if not covered:
            found, tokens = scores.sort(descending=True)
            weights = (found - total).exp()
    else:
        return scores.softmax(0), None
    if top_p is not None:  # a token stays if those before it do not reach top_p together
        before = weights.cumsum(0) - weights
        weights = torch.where(before < max(top_p, torch.finfo(torch.float32).tiny), weights, 0)
    if sampling.min_p:
        weights = torch.where(weights >= sampling.min_p * weights[0], weights, 0)
    return weights, tokens
