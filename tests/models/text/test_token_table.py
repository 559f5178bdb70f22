"""A text's ids by a part of the vocabulary are those of the whole tokenizer, and so are the texts of ids."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.decoders import DecodeStream

from gemma_awq_cli.models.text import merge_search
from gemma_awq_cli.models.text.token_table import TableStream, TokenTable, read_token_table
from gemma_awq_cli.models.text.tokenizer import load_tokenizer
from tests.properties import examples

# what a Gemma's merges are made of, and what JSON writes with escapes
WORDS = ["the", "quick", "brown", 'say "it"', "\\path\\to", "\n\n", "\t", "größer", "東京都", "é", "a[b]", '["x"', "  "]
ODD = [" ", "▁", "<0x41>", "🦜"]
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>"]


def gemma_like(merge_form: str = "lines") -> Tokenizer:
    """A tokenizer in the form of Gemma's: BPE with bytes for what is unknown, blanks as ▁, split behind them."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    draw = random.Random(1)
    lines = [" ".join(draw.choices(WORDS, k=12)) for _ in range(300)]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[*special, *bytes_], show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    stated = json.loads(tokenizer.to_str())
    # bytes are in the vocabulary, and no added tokens
    stated["added_tokens"] = [one for one in stated["added_tokens"] if one["content"] in SPECIAL]
    if merge_form == "strings":
        kept = [pair for pair in stated["model"]["merges"] if " " not in "".join(pair)]
        stated["model"]["merges"] = [" ".join(pair) for pair in kept]
    return Tokenizer.from_str(json.dumps(stated))


def table_of(folder: Path, stated: dict[str, Any] | str) -> TokenTable | None:
    path = folder / "tokenizer.json"
    path.write_text(stated if isinstance(stated, str) else json.dumps(stated, ensure_ascii=False), encoding="utf-8")
    return read_token_table(path)


@pytest.fixture(scope="module")
def whole() -> Tokenizer:
    return gemma_like()


@pytest.fixture(scope="module")
def written(whole: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    whole.save(str(path))
    return path


@given(
    st.lists(st.one_of(st.sampled_from([*WORDS, *SPECIAL, " ", "▁", "<0x41>", "🦜"]), st.text(max_size=4)), max_size=12)
)
@examples(150)
def test_the_ids_and_texts_are_those_of_the_library(whole: Tokenizer, written: Path, parts: list[str]) -> None:
    text = "".join(parts)
    table = read_token_table(written)
    assert table is not None
    ids = table.encode(text)
    assert ids == whole.encode(text, add_special_tokens=False).ids
    assert table.encode(text) == ids  # once more, from memory
    for skip in (True, False):
        assert table.decode(ids, skip) == whole.decode(ids, skip_special_tokens=skip)


@given(st.lists(st.integers(-1, 720), max_size=25))
@examples(150)
def test_tokens_one_by_one_are_those_of_the_librarys_stream(whole: Tokenizer, written: Path, ids: list[int]) -> None:
    known = [index for index in ids if whole.id_to_token(index) is not None] if -1 not in ids else []
    table = read_token_table(written)
    assert table is not None
    ours, theirs = TableStream(table), DecodeStream(skip_special_tokens=True)
    for index in known:
        failed, expected = False, None
        try:
            expected = theirs.step(whole, index)
        except Exception:  # noqa: BLE001 (it raises nothing more special where bytes change what was certain)
            failed = True
        assert ours.step(index) == expected
        if failed:
            return


@pytest.mark.parametrize("form", ["lines", "compact", "escaped", "strings"])
def test_merges_are_found_however_they_are_written(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = gemma_like(form)
    searched: list[bool] = []
    in_lines = merge_search._in_lines

    def seen(*arguments: Any) -> Any:
        found = in_lines(*arguments)
        searched.append(found is not None)
        return found

    monkeypatch.setattr(merge_search, "_in_lines", seen)
    stated = tokenizer.to_str(pretty=form in ("lines", "escaped"))
    if form == "strings":
        document = json.loads(stated)
        document["model"]["merges"] = [" ".join(pair) for pair in document["model"]["merges"]]
        stated = json.dumps(document)
    if form == "escaped":  # as Python's json writes it by default, with every other character escaped
        stated = json.dumps(json.loads(stated), indent=2)
    for text in (*WORDS, " ".join(WORDS), "the größer 東京都 say"):
        table = table_of(tmp_path, stated)
        assert table is not None
        assert table.encode(text) == tokenizer.encode(text, add_special_tokens=False).ids
    assert set(searched) == {form in ("lines", "escaped")}


def changed(whole: Tokenizer, **fields: Any) -> dict[str, Any]:
    stated: dict[str, Any] = json.loads(whole.to_str())
    model = {name: value for name, value in fields.items() if name in stated["model"]}
    stated["model"] |= model
    return stated | {name: value for name, value in fields.items() if name not in model}


@pytest.mark.parametrize(
    "fields",
    [
        {"dropout": 0.1}, {"continuing_subword_prefix": "##"}, {"end_of_word_suffix": "</w>"}, {"type": "WordPiece"},
        {"normalizer": {"type": "NFC"}}, {"normalizer": {"type": "Prepend", "prepend": "▁"}},
        {"normalizer": {"type": "Replace", "pattern": {"String": "ab"}, "content": "▁"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}},
        {"vocab": {}}, {"vocab": {"a": "1"}}, {"added_tokens": [{"id": 1}]},
    ],
)  # fmt: skip
def test_what_is_not_plain_has_no_table(fields: dict[str, Any], whole: Tokenizer, tmp_path: Path) -> None:
    assert table_of(tmp_path, changed(whole, **fields)) is None


def test_added_tokens_without_the_ids_that_the_library_gives_have_no_table(whole: Tokenizer, tmp_path: Path) -> None:
    stated = json.loads(whole.to_str())
    size, plain = len(stated["model"]["vocab"]), stated["added_tokens"][0]
    stated["added_tokens"].append({**plain, "content": "<new>", "id": size})
    table = table_of(tmp_path, stated)
    assert table is not None
    theirs = Tokenizer.from_str(json.dumps(stated))
    assert table.encode("the<new>the") == theirs.encode("the<new>the", add_special_tokens=False).ids
    stated["added_tokens"][-1]["id"] = size + 1
    assert table_of(tmp_path, stated) is None


def test_a_merge_of_bytes_takes_the_whole_machine(whole: Tokenizer, tmp_path: Path) -> None:
    stated = json.loads(whole.to_str())
    stated["model"]["vocab"]["<0xF0><0x9F>"] = len(stated["model"]["vocab"])
    stated["model"]["merges"].append(["<0xF0>", "<0x9F>"])
    table = table_of(tmp_path, stated)
    assert table is not None
    assert table.encode("the") is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": 1}', "\x00", '{"version": "1.0"'])
def test_what_cannot_be_read_has_no_table(text: str, tmp_path: Path) -> None:
    assert table_of(tmp_path, text) is None


def test_a_tokenizer_is_whole_as_soon_as_that_is_needed(written: Path, whole: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(written.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<bos>", "eos_token": "<eos>"}')
    ours, other = load_tokenizer(tmp_path, one_text=True), load_tokenizer(tmp_path)
    assert ours._table is not None

    def facts(tokenizer: Any) -> list[Any]:
        return [
            len(tokenizer), tokenizer.special_id("bos_token"), tokenizer.id_of("the"), tokenizer.id_of("none"),
            tokenizer.token_of(3), tokenizer.token_of(10**6), tokenizer.is_added(2), tokenizer.is_added(300),
            tokenizer.text_of(300), tokenizer.encode("the quick"), tokenizer.decode([2, 300, 301], True),
        ]  # fmt: skip

    assert facts(ours) == facts(other)
    stream = ours.decode_stream()
    assert ours._table is not None
    assert ours.encode("a second text") == other.encode("a second text")
    assert ours._table is None
    assert stream(300) == other.decode_stream()(300)
    assert facts(ours) == facts(other)


def test_a_decoder_that_writes_much_is_refused(whole: Tokenizer, tmp_path: Path) -> None:
    from gemma_awq_cli.errors import GemmaAwqError

    bomb = {"type": "Replace", "pattern": {"String": "▁"}, "content": "x" * 1000}
    table_of(tmp_path, changed(whole, decoder=bomb))
    for one_text in (True, False):
        with pytest.raises(GemmaAwqError, match="turns one character into more than"):
            load_tokenizer(tmp_path, one_text)
