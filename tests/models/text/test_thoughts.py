"""Thoughts and answer are told apart while they come, piece by piece."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_awq_cli.models.text.thoughts import TurnDetokenizer
from gemma_awq_cli.models.text.tokenizer import Tokenizer, load_tokenizer
from tests.properties import examples
from tests.tiny import GEMMA4_SPECIAL, make_tokenizer

TEXTS = st.text(st.sampled_from("ab\n ß東😀"), max_size=12)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder, special=GEMMA4_SPECIAL)
    return load_tokenizer(folder)


def streamed(tokenizer: Tokenizer, turn: str, stop: tuple[str, ...] = ()) -> tuple[list[tuple[str, str]], str, str]:
    """The pieces, each with what it is a piece of, and the whole answer and thoughts."""
    pieces: list[tuple[str, str]] = []
    stream = TurnDetokenizer(
        tokenizer, stop, lambda text: pieces.append(("answer", text)), lambda text: pieces.append(("thought", text))
    )
    any(stream.add(token) for token in tokenizer.encode(turn))
    return (pieces, *stream.finish())


@pytest.mark.parametrize(
    ("turn", "answer", "thoughts"),
    [
        ("Hi.", "Hi.", ""),
        ("<|channel>thought\nHm, 東京?\nYes.\n<channel|>Hi.<turn|>", "Hi.", "Hm, 東京?\nYes."),
        ("<|channel>thought\n<channel|>Hi.", "Hi.", ""),  # an empty thought
        ("<|channel>thought\n\n \n<channel|>\nHi.", "\nHi.", ""),
        ("<|channel><channel|>Hi.", "Hi.", ""),
        ("<|channel>thought\nHm", "", "Hm"),  # cut while it thinks
        ("<|channel>thou", "", ""),
        ("<|channel>thought\na<channel|>b<|channel>thought\nc\n<channel|>d", "bd", "a\n\nc"),
        ("<|channel>thought\na<|channel>thought\nb<channel|>c", "c", "a\n\nb"),  # begun anew without an end
        ("Hi<channel|> there.", "Hi there.", ""),  # an end without a beginning
        ("<|think|>Hi<|turn>", "Hi", ""),  # no special token is ever shown
    ],
)  # fmt: skip
def test_thoughts_are_no_part_of_the_answer(tokenizer: Tokenizer, turn: str, answer: str, thoughts: str) -> None:
    pieces, whole, thinking = streamed(tokenizer, turn)
    assert (whole, thinking) == (answer, thoughts)
    assert "".join(text for kind, text in pieces if kind == "answer") == answer
    assert "".join(text for kind, text in pieces if kind == "thought") == thoughts


def test_thoughts_come_as_they_are_written(tokenizer: Tokenizer) -> None:
    pieces, _, _ = streamed(tokenizer, "<|channel>thought\na b<channel|>c")
    assert pieces == [("thought", "a"), ("thought", " b"), ("answer", "c")]


def test_stop_strings_end_the_answer_and_no_thought(tokenizer: Tokenizer) -> None:
    _, answer, thoughts = streamed(tokenizer, "<|channel>thought\none. two.<channel|>three. four", (".",))
    assert (answer, thoughts) == ("three", "one. two.")


def test_a_tokenizer_without_channels_has_no_thoughts(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    turn = "<|channel>thought\nHm.<channel|>Hi."
    assert streamed(load_tokenizer(tmp_path), turn)[1:] == (turn, "")


@given(thoughts=TEXTS, answer=TEXTS)
@examples(150)
def test_any_thoughts_and_any_answer(tokenizer: Tokenizer, thoughts: str, answer: str) -> None:
    pieces, whole, thinking = streamed(tokenizer, f"<|channel>thought\n{thoughts}<channel|>{answer}")
    assert (whole, thinking) == (answer, thoughts.strip())
    assert "".join(text for kind, text in pieces if kind == "thought") == thinking
    assert all(text for _, text in pieces)
