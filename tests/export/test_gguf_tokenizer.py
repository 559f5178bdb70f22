"""The scores of a tokenizer's pieces make the same merges as its list does."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.export.gguf_tokenizer import TokenType, gguf_tokenizer
from gemma_awq_cli.models.text.tokenizer import load_tokenizer
from tests.tiny import SPECIAL, add_tokens, make_gemma_tokenizer, make_tokenizer

PIECES = ("t", "h", "e", "r", "he", "th", "the", "er", "re", "her", "▁t", "▁th", "▁the")


def merged_by_scores(text: str, tokens: list[str], scores: list[float]) -> list[int]:
    """llama.cpp's SentencePiece tokenizer: of all neighbours, the pair with the highest joint score merges first."""
    ids = {token: index for index, token in enumerate(tokens)}
    symbols = list(text.replace(" ", "▁"))
    while True:
        pairs = [(-scores[ids[a + b]], i) for i, (a, b) in enumerate(pairwise(symbols))
                 if a + b in ids]  # fmt: skip
        if not pairs:
            break
        _, at = min(pairs)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    known = []
    for symbol in symbols:
        known += [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return known


@pytest.mark.parametrize("text", ["the there", "here three ether", "thethe  the", "Größe \N{SNOWMAN}", "retherhe"])
def test_scores_merge_as_the_tokenizer_itself_does(text: str, tmp_path: Path) -> None:
    make_gemma_tokenizer(tmp_path, PIECES)
    found = gguf_tokenizer(tmp_path, 300, False, "<end_of_turn>")
    assert merged_by_scores(text, list(found.tokens), list(found.scores)) == load_tokenizer(tmp_path).encode(text)


def test_types_and_special_tokens(tmp_path: Path) -> None:
    make_gemma_tokenizer(tmp_path, PIECES)
    stored = json.loads((tmp_path / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    for content in ("\n\n", "▁▁", "<unused7>"):
        stored["added_tokens"].append({"id": len(stored["model"]["vocab"]), "content": content, **flags})
        stored["model"]["vocab"][content] = len(stored["model"]["vocab"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    found = gguf_tokenizer(tmp_path, 300, False, "<end_of_turn>")
    at = {token: index for index, token in enumerate(found.tokens)}
    assert found.special == {"bos": 2, "eos": 1, "unk": 3, "pad": 0, "eot": 5}
    assert [found.types[at[token]] for token in SPECIAL] == [TokenType.CONTROL] * 6
    assert found.types[at["<0x41>"]] == TokenType.BYTE
    assert found.types[at["the"]] == TokenType.NORMAL
    assert found.types[at["\n\n"]] == found.types[at["  "]] == TokenType.USER_DEFINED
    assert found.types[at["<unused7>"]] == TokenType.CONTROL
    assert found.tokens[299] == "[PAD299]"
    assert found.types[299] == TokenType.UNUSED


def test_gemma_4_has_its_merges_and_shows_its_channels(tmp_path: Path) -> None:
    make_gemma_tokenizer(tmp_path, PIECES)
    found = gguf_tokenizer(tmp_path, 300, True, "<turn|>")
    assert found.model == "gemma4"
    assert found.merges[:3] == ["h e", "t h", "t he"]
    assert "eot" not in found.special


def test_tokens_behind_the_embedding_are_left_out(tmp_path: Path) -> None:
    make_gemma_tokenizer(tmp_path)
    add_tokens(tmp_path, "<image>")
    assert len(gguf_tokenizer(tmp_path, 264, False, "<end_of_turn>").tokens) == 264


def test_a_byte_level_tokenizer_is_refused(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    with pytest.raises(GemmaAwqError, match="not of Gemma's kind"):
        gguf_tokenizer(tmp_path, 264, False, "<end_of_turn>")
