"""The sampling settings of a run: those of the model's generation_config, unless the user gives others.

Imports no torch; the choice of a token is in `sampler.py`.
"""

import hashlib
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError, UsageError

CORRECT = "Correct it, or copy the file from the original model."


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled: greedily unless a temperature, top_k, top_p or min_p is given.

    seed: of the random numbers; None lets `resolve` draw one. repetition_penalty: divides the logits of tokens in the
    prompt and the text so far; 1 turns it off. presence_penalty, frequency_penalty: OpenAI's, subtracted from the
    logits of tokens generated so far, once and per occurrence. logit_bias: (token id, number added to its logit).
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    @property
    def greedy(self) -> bool:
        asked = (self.temperature, self.top_k, self.top_p, self.min_p)
        return self.temperature == 0 or all(value is None for value in asked)

    def summary(self) -> str:
        """Return the settings as text for a note: `temperature 0.8, top-p 0.95, seed 7`."""
        penalties = [
            f"{name} penalty {value:g}"
            for name, value in (
                ("repetition", self.repetition_penalty),
                ("presence", self.presence_penalty),
                ("frequency", self.frequency_penalty),
            )
            if value
        ]
        if self.greedy:
            return ", ".join(["greedy", *penalties])
        parts = [f"temperature {1.0 if self.temperature is None else self.temperature:g}"]
        parts += [f"top-k {self.top_k}"] if self.top_k else []
        parts += [f"top-p {self.top_p:g}"] if self.top_p is not None else []
        parts += [f"min-p {self.min_p:g}"] if self.min_p else []
        return ", ".join([*parts, *penalties, f"seed {self.seed}"])


def resolve(asked: Sampling, declared: Mapping[str, Any]) -> Sampling:
    """Return the settings that the user asked for, completed by the model's generation_config.

    If the user gives no temperature, top_k, top_p or min_p, `declared` (the generation_config) decides whether to
    sample. It also fills in what the user left open; top_k 0, top_p 1, min_p 0 and repetition_penalty 1 turn off what
    it declares. If no seed is given, one is drawn, so that the run can be reported and repeated. Raises UsageError for
    a value out of range.
    """
    _require_valid(asked)
    stated = {name: _number(declared, name) for name in _DECLARED}
    samples = _samples(declared)
    penalty = _first(asked.repetition_penalty, stated["repetition_penalty"])
    common = replace(asked, repetition_penalty=None if penalty == 1 else penalty)
    if asked.temperature == 0 or (asked.greedy and not samples):
        return replace(common, temperature=0.0, top_k=None, top_p=None, min_p=None, seed=None)
    top_k = _first(asked.top_k, stated["top_k"])
    given = replace(
        common,
        temperature=_first(asked.temperature, stated["temperature"], 1.0),
        top_k=int(top_k) if top_k else None,  # 0 turns top-k off
        top_p=_first(asked.top_p, stated["top_p"]),
        min_p=_first(asked.min_p, stated["min_p"]) or None,
        seed=asked.seed if asked.seed is not None else secrets.randbelow(2**32),
    )
    return replace(given, seed=None) if given.temperature == 0 else given


def _require_valid(asked: Sampling) -> None:
    if asked.temperature is not None and not (math.isfinite(asked.temperature) and asked.temperature >= 0):
        raise UsageError(f"Invalid temperature: {asked.temperature}.", "Give a finite number, 0 or greater.")
    for name, share in (("top-p", asked.top_p), ("min-p", asked.min_p)):
        if share is not None and not 0 <= share <= 1:
            raise UsageError(f"Invalid {name}: {share}.", "Give a number from 0 to 1.")
    if asked.top_k is not None and asked.top_k < 0:
        raise UsageError(f"Invalid top-k: {asked.top_k}.", "Give 1 or more, or 0 to turn it off.")
    if asked.repetition_penalty is not None and not 1e-6 <= asked.repetition_penalty <= 1e6:
        raise UsageError(
            f"Invalid repetition penalty: {asked.repetition_penalty}.", "Give a number above 0; 1 turns it off."
        )
    for name, penalty in (("presence", asked.presence_penalty), ("frequency", asked.frequency_penalty)):
        if not -2 <= penalty <= 2:
            raise UsageError(f"Invalid {name} penalty: {penalty}.", "Give a number from -2 to 2.")


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)


# The type of each value of a generation_config and its bounds, both included. For some of them 0 means `off`.
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
            f"Invalid {name} in the model's generation_config.json: {repr(value)[:80]} is not {sort} from {least:g} to "
            f"{most:.0f}.",
            CORRECT,
        )
    return value


def _samples(declared: Mapping[str, Any]) -> bool:
    value = declared.get("do_sample")
    if value is not None and not isinstance(value, bool):
        raise GemmaAwqError(
            f"Invalid do_sample in the model's generation_config.json: {repr(value)[:80]} is neither true nor false.",
            CORRECT,
        )
    return bool(value)


def row_seed(seed: int, row: int) -> int:
    """Return a 63-bit seed for one row of a run, different for every row and for every seed of the run."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{row}".encode()).digest()[:8], "big") >> 1
