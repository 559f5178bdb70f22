"""The kinds of cases: each is a function of a random number generator and the folder of bases, in its own words."""

import random
from collections.abc import Callable
from pathlib import Path

from tests.fuzz.cases import Case
from tests.fuzz.kinds import data, folders, model, options, outcomes
from tests.fuzz.kinds.common import Draft

Maker = Callable[[random.Random, Path], Draft]
KINDS: dict[str, Maker] = {
    "config": model.config,
    "weights": model.weights,
    "packed": model.packed,
    "index": model.index,
    "tokenizer": model.tokenizer,
    "template": model.template,
    "generation": model.generation,
    "files": folders.files,
    "card": folders.card,
    "staged": folders.staged,
    "report": outcomes.report,
    "bench": outcomes.bench,
    "baseline": outcomes.baseline,
    "calibration": data.calibration,
    "prompts": data.prompts,
    "answers": data.answers,
    "chat": data.chat,
    "options": options.options,
}


def make_case(kind: str, seed: int, root: Path) -> Case:
    """The case of a kind and a number: always the same one for the same bases."""
    rng = random.Random(f"{kind}:{seed}")
    draft = KINDS[kind](rng, root)
    return Case(kind, seed, draft.base, draft.steps, draft.arguments, draft.stdin, draft.terminal)
