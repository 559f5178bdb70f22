"""A batch's results file, cut at any byte as a killed process leaves it: whole rows stay, and the end is the same."""

import random
import tempfile
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.generate.batch import Batch, complete_batch, read_finished
from gemma_awq_cli.generate.generation import Engine, GenerationOptions, Row
from gemma_awq_cli.generate.sampling import Sampling
from gemma_awq_cli.models.text.prompter import Prompter
from tests.properties import examples

TOKENS = 12
PROMPTS = st.lists(st.text(st.sampled_from('a"\\\n{}東😀'), min_size=1, max_size=6), min_size=1, max_size=6)


class Shuffled(Engine):
    """Each row's tokens are its number's alone; the rows end in an order that is drawn."""

    def __init__(self, prompter: Prompter, order: random.Random) -> None:
        super().__init__(prompter, context=256, ends={1})
        self._order = order

    def _steps(
        self, rows: Sequence[Row], sampling: Sampling, on_done: Callable[[Row], None]
    ) -> Generator[None, None, None]:
        for row in self._order.sample(rows, len(rows)):
            row.begin(len(row.ids))
            tokens = random.Random(row.number)
            while not row.done:
                row.take(tokens.randrange(6, 262))
                yield
            on_done(row)


@pytest.fixture(scope="module")
def prompter(checkpoints: Callable[[str], Path]) -> Prompter:
    return Prompter(checkpoints("gemma"))


def batch(prompts: Sequence[str]) -> Batch:
    return Batch(prompts, None, False, GenerationOptions(TOKENS), {"model": "tiny", "seed": 3})


@given(prompts=PROMPTS, order=st.randoms(use_true_random=False), part=st.floats(0, 1), twice=st.booleans())
@examples(100)
def test_a_file_that_is_cut_anywhere_is_gone_on_with(
    prompter: Prompter, prompts: list[str], order: random.Random, part: float, twice: bool
) -> None:
    engine, work = Shuffled(prompter, order), batch(prompts)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "answers.jsonl"
        assert complete_batch(engine, work, path, {}, lambda *_: None)
        whole = path.read_bytes()
        for _ in range(1 + twice):
            kept = whole[: round(part * len(whole))]
            path.write_bytes(kept)
            finished = read_finished(path, work)
            assert len(finished) == kept.count(b"\n")
            assert path.read_bytes() == kept[: kept.rfind(b"\n") + 1]
            done: list[int] = []
            assert complete_batch(engine, work, path, finished, lambda index, _, done=done: done.append(index))
            assert sorted([*finished, *done]) == list(range(len(prompts)))
            assert path.read_bytes() == whole


@given(prompts=PROMPTS, at=st.integers(0, 2000), byte=st.integers(0, 255))
@examples(100)
def test_what_another_program_wrote_is_left_alone(prompter: Prompter, prompts: list[str], at: int, byte: int) -> None:
    """A byte that is changed anywhere: an error that names the file and leaves it as it is, or rows that are whole."""
    work = batch(prompts)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "answers.jsonl"
        assert complete_batch(Shuffled(prompter, random.Random(0)), work, path, {}, lambda *_: None)
        content = bytearray(path.read_bytes())
        content[at % len(content)] = byte
        path.write_bytes(content)
        refusal: GemmaAwqError | None = None
        finished = {}
        try:
            finished = read_finished(path, work)
        except GemmaAwqError as error:
            refusal = error
        if refusal is not None:
            assert str(path) in refusal.message
            assert refusal.hint
            assert path.read_bytes() == content
        assert all(prompts[index] == row["prompt"] for index, row in finished.items())
        assert bytes(content).startswith(path.read_bytes())  # of a last line without its end at most
