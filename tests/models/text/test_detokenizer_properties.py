"""The text stream at any text and any tokens: no piece is taken back, and no stop text ever shows."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_awq_cli.models.text.detokenizer import StreamingDetokenizer
from gemma_awq_cli.models.text.tokenizer import Tokenizer, load_tokenizer
from tests.properties import examples
from tests.tiny import VOCAB, make_tokenizer

# few letters, so that stop texts are met, and letters of two to four bytes, which tokens cut apart
LETTERS = st.sampled_from("aab\nß東😀")
TEXTS = st.one_of(st.text(LETTERS, max_size=24), st.text(st.characters(codec="utf-8"), max_size=24))
STOPS = st.lists(st.text(LETTERS, max_size=4), max_size=3)
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A token for each byte."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return load_tokenizer(folder)


def streamed(tokenizer: Tokenizer, tokens: Sequence[int], stop: Sequence[str]) -> tuple[list[str], str, bool]:
    """The pieces, the whole text at the end, and whether a stop text ended it."""
    pieces: list[str] = []
    stream = StreamingDetokenizer(tokenizer, stop, pieces.append)
    stopped = any(stream.add(token) for token in tokens)  # ends with the first that completes one
    return pieces, stream.finish(), stopped


def before(text: str, stop: Sequence[str]) -> str:
    """The text before the stop text that is complete first; of two that are at the same letter, the longer one."""
    for end in range(1, len(text) + 1):
        places = [place for string in stop if string and (place := text[:end].find(string)) >= 0]
        if places:
            return text[: min(places)]
    return text


@given(text=TEXTS, stop=STOPS)
@examples(250)
def test_the_pieces_are_the_text_before_the_first_stop_text(
    tokenizer: Tokenizer, text: str, stop: Sequence[str]
) -> None:
    tokens = tokenizer.backend.encode(text, add_special_tokens=False).ids
    pieces, whole, stopped = streamed(tokenizer, tokens, stop)
    expected = before(text, stop)
    assert "".join(pieces) == whole == expected
    assert all(pieces)
    assert stopped == any(string and string in text for string in stop)
    assert not any(string and string in whole for string in stop)


@given(tokens=st.lists(st.integers(0, VOCAB - 1), max_size=30), stop=STOPS)
@examples(250)
def test_any_tokens_are_written_as_the_tokenizer_writes_them_all(
    tokenizer: Tokenizer, tokens: list[int], stop: Sequence[str]
) -> None:
    """Bytes that are no text too; an incomplete letter at the end is not written."""
    pieces, whole, stopped = streamed(tokenizer, tokens, stop)
    assert "".join(pieces) == whole
    assert not any(string and string in whole for string in stop)
    if not stopped:
        assert whole.rstrip(REPLACEMENT) == tokenizer.backend.decode(tokens).rstrip(REPLACEMENT)
