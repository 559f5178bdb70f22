"""The kinds of cases: each is a function of a random number generator and the folder of bases, in its own words."""

import random
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

from tests.fuzz.cases import Case
from tests.fuzz.kinds import data, folders, model, options, outcomes
from tests.fuzz.kinds.common import Draft

Maker = Callable[[random.Random, Path], Draft]
# Each with its share of the cases: more where there is more to damage, fewer where a case takes long.
_SHARES: dict[str, tuple[Maker, int]] = {
    "config": (model.config, 60),
    "weights": (model.weights, 45),
    "packed": (model.packed, 45),
    "foreign": (model.foreign, 40),
    "index": (model.index, 20),
    "tokenizer": (model.tokenizer, 40),
    "template": (model.template, 35),
    "generation": (model.generation, 20),
    "files": (folders.files, 30),
    "card": (folders.card, 20),
    "staged": (folders.staged, 20),
    "report": (outcomes.report, 30),
    "bench": (outcomes.bench, 20),
    "baseline": (outcomes.baseline, 15),
    "calibration": (data.calibration, 30),
    "prompts": (data.prompts, 20),
    "answers": (data.answers, 15),
    "chat": (data.chat, 15),
    "options": (options.options, 40),
}
KINDS = {kind: maker for kind, (maker, _) in _SHARES.items()}


def shares(kinds: Sequence[str], count: int) -> dict[str, int]:
    """`count` cases shared out among kinds."""
    whole = sum(_SHARES[kind][1] for kind in kinds)
    ends = [round(count * part / whole) for part in accumulate(_SHARES[kind][1] for kind in kinds)]
    return {kind: end - begin for kind, begin, end in zip(kinds, [0, *ends], ends, strict=False)}


def make_case(kind: str, seed: int, root: Path) -> Case:
    """The case of a kind and a number: always the same one for the same bases."""
    rng = random.Random(f"{kind}:{seed}")
    draft = KINDS[kind](rng, root)
    return Case(kind, seed, draft.base, draft.steps, draft.arguments, draft.stdin, draft.terminal)
