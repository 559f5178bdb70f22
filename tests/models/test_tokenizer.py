"""The tokenizer from its own file is AutoTokenizer's, token for token."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.tokenizer import load_tokenizer
from tests.tiny import CHAT_TEMPLATE, TEXT, make_tokenizer


@pytest.mark.parametrize("chat", [False, True])
def test_it_is_autotokenizers(chat: bool, tmp_path: Path) -> None:
    make_tokenizer(tmp_path, chat)
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in (TEXT, "", "  a\n\n\tb <bos><start_of_turn>user\nHi<end_of_turn>\n"):
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ours(text, add_special_tokens=False).input_ids == ids
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    for name in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id", "chat_template"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.chat_template == (CHAT_TEMPLATE if chat else None)


def test_a_damaged_file_is_said(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0",')
    with pytest.raises(GemmaAwqError, match="tokenizer"):
        load_tokenizer(tmp_path)
