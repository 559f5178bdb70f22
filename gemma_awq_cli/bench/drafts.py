"""What drafted tokens gain: decoding with and without them, on a fixed set of texts, and how many of them were right.

The texts are summaries, edits and code, which copy spans of their prompts, and others, which copy nothing. There are
two ways to decode one. `written`: the model reads an answer that is given, as if it had chosen each of its tokens,
which tells what a model gains that writes such answers; all else is done as in decoding, the choice of a token
included. `generated`: the model's own text, greedily where it copies, and else sampled, because small models repeat
themselves when they are greedy, which drafts gain from and users do not.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_awq_cli.bench.events import OnProgress, counted
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.generate.draft_choice import BeginDraft, nothing, open_drafts
from gemma_awq_cli.generate.generation import Completion, GenerationOptions
from gemma_awq_cli.generate.local_engine import LocalEngine
from gemma_awq_cli.generate.request import LOOKUP
from gemma_awq_cli.generate.sampler import Largest, Sampler
from gemma_awq_cli.generate.sampling import Sampling
from gemma_awq_cli.models.forward.loading import OpenModel
from gemma_awq_cli.models.forward.session import Logits

TEXTS = Path(__file__).with_name("drafted_texts.json")
OTHER = "other"  # the kind that copies nothing
OTHER_SAMPLING = Sampling(temperature=0.8, seed=1)


@dataclass(frozen=True)
class DraftText:
    """A text to decode: what kind it is of, its name, its prompt, an answer, and the strings that end one."""

    kind: str
    name: str
    prompt: str
    answer: str
    stop: Sequence[str]


Way = Callable[[OpenModel, BeginDraft, DraftText, int], Completion]  # the last: the most tokens to decode


def read_texts(file: Path) -> list[DraftText]:
    """Return the texts of a JSON file: a list of objects with the fields of `DraftText`."""
    return [DraftText(**text) for text in json.loads(file.read_text(encoding="utf-8"))]


def written(opened: OpenModel, begin: BeginDraft, text: DraftText, tokens: int) -> Completion:
    """Decode the answer that the text has."""
    prompter = opened.prompter
    ids = prompter.ids(text.prompt)
    answer = prompter.ids(text.prompt + text.answer)[len(ids) :][:tokens]

    class Given(Sampler):
        """Chooses a token as always, and takes that of the answer."""

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self._left = list(answer)

        def sample(self, logits: Logits, leading: Largest | None = None) -> int:
            super().sample(logits, leading)
            return self._left.pop(0)

    engine = LocalEngine(opened, 1, begin_draft=begin, make_sampler=Given)
    return engine.complete([ids], GenerationOptions(len(answer), Sampling(temperature=0.0)))[0]


def generated(opened: OpenModel, begin: BeginDraft, text: DraftText, tokens: int) -> Completion:
    """Let the model continue the prompt."""
    sampling = OTHER_SAMPLING if text.kind == OTHER else Sampling(temperature=0.0)
    engine = LocalEngine(opened, 1, begin_draft=begin)
    return engine.complete([opened.prompter.ids(text.prompt)], GenerationOptions(tokens, sampling, text.stop))[0]


def measure_drafts(opened: OpenModel, choice: str, tokens: int, rounds: int, on_progress: OnProgress) -> dict[str, Any]:
    """Decode every text with and without drafts, `rounds` times in turn; at most `tokens` tokens of each.

    choice: see `open_drafts`. Answers are written for drafts from the row itself, and generated for those of another
    model, which guesses what this one would say. Returns {"way", "kinds"}: for each kind of text its name, how many
    tokens were decoded, drafted and right in a round, and the seconds of each round `with` and `without` drafts. Raises
    GemmaAwqError if drafts cannot be made, or changed a text.
    """
    begin = open_drafts(choice, opened, lambda note: None)
    way = written if choice == LOOKUP else generated
    texts = read_texts(TEXTS)
    step = counted(2 * rounds * len(texts), on_progress)
    kinds = {text.kind: _Kind(text.kind, rounds) for text in texts}
    way(opened, begin, texts[0], tokens)  # what is read lazily is read now
    for number in range(rounds):
        for text in texts:
            made = []
            for drafts in (nothing, begin):
                made.append(way(opened, drafts, text, tokens))
                step()
            if made[0].tokens != made[1].tokens:
                raise GemmaAwqError(
                    f"Drafts changed the text {text.name!r}: this device's sums round differently for several tokens.",
                    "Leave --draft out.",
                )
            kinds[text.kind].add(number, *made)
    return {"way": way.__name__, "kinds": [kind.record() for kind in kinds.values()]}


class _Kind:
    """The figures of one kind of text."""

    def __init__(self, name: str, rounds: int) -> None:
        self._name = name
        self._without, self._with = [0.0] * rounds, [0.0] * rounds
        self._counts = [0, 0, 0]  # tokens after the first, which the prompt gives; drafted; right

    def add(self, number: int, plain: Completion, drafted: Completion) -> None:
        """Add a text's completions without and with drafts in a round."""
        self._without[number] += plain.decode_seconds
        self._with[number] += drafted.decode_seconds
        if number == 0:  # every round decodes the same
            counts = (len(drafted.tokens) - 1, drafted.drafted_tokens, drafted.accepted_tokens)
            self._counts = [old + new for old, new in zip(self._counts, counts, strict=True)]

    def record(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        tokens, drafted, right = self._counts
        return {
            "kind": self._name, "tokens": tokens, "drafted_tokens": drafted, "accepted_tokens": right,
            "without": self._without, "with": self._with,
        }  # fmt: skip
