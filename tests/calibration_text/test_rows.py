"""Calibration rows: BOS everywhere, no text lost, the same for a seed, and every kind of source."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gemma_awq_cli.calibration_text.recipes import data_folder, find_recipe, recipe_names
from gemma_awq_cli.calibration_text.rows import build_rows
from gemma_awq_cli.cli.app import main
from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.models.text.prompter import Prompter
from tests.tiny import make_tokenizer

BOS = 2


@pytest.fixture
def prompter(checkpoints: Callable[[str], Path]) -> Prompter:
    return Prompter(checkpoints("gemma"))


@pytest.fixture
def chat_prompter(tmp_path: Path, checkpoints: Callable[[str], Path]) -> Prompter:
    make_tokenizer(tmp_path / "chat", chat=True)
    (tmp_path / "chat" / "config.json").write_text((checkpoints("gemma") / "config.json").read_text())
    return Prompter(tmp_path / "chat")


def rows_of(prompter: Prompter, path: Path, samples: int = 1000, seq_len: int = 16, seed: int = 0) -> list[list[int]]:
    rows = build_rows(find_recipe(str(path)), prompter, samples, seq_len, seed, heldout_samples=2)
    return [*rows.ids.tolist(), *rows.heldout.tolist()]


def write_jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_every_row_begins_with_bos_and_no_text_is_lost(tmp_path: Path, prompter: Prompter) -> None:
    text = "".join(f"{i:03d}." for i in range(300))
    (tmp_path / "t.txt").write_text(text)
    rows = rows_of(prompter, tmp_path / "t.txt")
    assert all(row[0] == BOS and row.count(BOS) == 1 and len(row) == 16 for row in rows)
    pieces = sorted(prompter.tokenizer.decode(row[1:]) for row in rows)
    assert pieces == sorted(text[i : i + 15] for i in range(0, 1200, 15))


def test_rows_are_decided_by_the_seed_alone(tmp_path: Path, prompter: Prompter) -> None:
    (tmp_path / "t.txt").write_text("".join(f"{i:03d}." for i in range(300)))
    recipe = find_recipe(str(tmp_path / "t.txt"))
    first, again, other = (build_rows(recipe, prompter, 20, 16, seed, 2) for seed in (7, 7, 8))
    assert first.text_sha256 == again.text_sha256 != other.text_sha256
    assert len(first.ids) == 20
    held_out = {tuple(row) for row in first.heldout.tolist()}
    assert held_out.isdisjoint(tuple(row) for row in first.ids.tolist())


def test_jsonl_takes_text_prompt_and_response_and_messages(tmp_path: Path, chat_prompter: Prompter) -> None:
    path = write_jsonl(
        tmp_path / "t.jsonl",
        {"text": "plain words"},
        {"prompt": "ask me", "response": "an answer"},
        {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]},
        *({"text": "filler " * 30} for _ in range(9)),
    )
    rows = build_rows(find_recipe(str(path)), chat_prompter, 1000, 400, 0, 1)
    text = "".join(chat_prompter.tokenizer.decode(row) for row in [*rows.ids.tolist(), *rows.heldout.tolist()])
    assert "plain words" in text
    assert "<bos><start_of_turn>user\nask me<end_of_turn>\n<start_of_turn>model\nan answer<end_of_turn>" in text
    assert "<start_of_turn>model\ngood day<end_of_turn>" in text


def test_a_base_model_sees_conversations_as_plain_text(tmp_path: Path, prompter: Prompter) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", *({"prompt": "ask me", "response": "an answer"} for _ in range(30)))
    text = "".join(prompter.tokenizer.decode(row) for row in rows_of(prompter, path))
    assert "ask me" in text
    assert "start_of_turn" not in text


def test_parquet_and_a_named_column(tmp_path: Path, prompter: Prompter) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["some words " * 20] * 4}), path)
    with pytest.raises(GemmaAwqError, match="no text in a known form; it has body") as error:
        rows_of(prompter, path)
    assert "--text-column" in error.value.hint
    recipe = find_recipe(str(path), text_column="body")
    assert len(build_rows(recipe, prompter, 5, 16, 0, 2).ids) == 5


@pytest.mark.slow
def test_a_dataset_through_the_datasets_library(
    tmp_path: Path, prompter: Prompter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dataset id `owner/name`, read by the real library (from a local folder: no network here)."""
    import datasets

    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", *({"body": f"document {i} " * 9} for i in range(40)))
    load = datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, *a, **k: load(str(folder) if name == "owner/name" else name, *a, **k)
    )
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    recipe = find_recipe("owner/name", split="train", text_column="body")
    rows = build_rows(recipe, prompter, 12, 32, 0, 2)
    assert rows.ids.shape == (12, 32)
    assert "document" in prompter.tokenizer.decode(rows.ids[0])
    assert rows.description == "owner/name (hub dataset owner/name, train)"
    with pytest.raises(GemmaAwqError, match="no text column 'words'"):
        build_rows(find_recipe("owner/name", text_column="words"), prompter, 12, 32, 0, 2)
    with pytest.raises(GemmaAwqError, match="dataset owner/other cannot be read"):
        build_rows(find_recipe("owner/other"), prompter, 12, 32, 0, 2)


@pytest.mark.parametrize("content", ["", "short"])
def test_a_text_that_is_too_short(tmp_path: Path, prompter: Prompter, content: str) -> None:
    (tmp_path / "t.txt").write_text(content)
    with pytest.raises(GemmaAwqError, match="too short") as error:
        rows_of(prompter, tmp_path / "t.txt")
    assert "--seq-len" in error.value.hint


def test_bad_files_are_named(tmp_path: Path, prompter: Prompter) -> None:
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    with pytest.raises(GemmaAwqError, match="not UTF-8"):
        rows_of(prompter, tmp_path / "latin.txt")
    (tmp_path / "t.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(GemmaAwqError, match="line 2 is not valid JSON"):
        rows_of(prompter, tmp_path / "t.jsonl")
    with pytest.raises(GemmaAwqError, match="does not exist"):
        find_recipe(str(tmp_path / "absent.txt"))
    with pytest.raises(GemmaAwqError, match="no calibration recipe") as error:
        find_recipe("embeded")
    assert "embedded" in error.value.hint
    with pytest.raises(UsageError):
        find_recipe("embedded", split="train")


def test_a_recipe_file_of_ones_own(tmp_path: Path, prompter: Prompter) -> None:
    (tmp_path / "a.txt").write_text("words of mine " * 50)
    (tmp_path / "mine.json").write_text(json.dumps({"texts": ["a.txt"]}))
    assert rows_of(prompter, tmp_path / "mine.json")
    (tmp_path / "bad.json").write_text(json.dumps({"texts": ["absent.txt"]}))
    with pytest.raises(GemmaAwqError, match=r"missing: .*absent.txt"):
        find_recipe(str(tmp_path / "bad.json"))
    (tmp_path / "bad.json").write_text(json.dumps({"text": ["a.txt"]}))
    with pytest.raises(GemmaAwqError, match="not a recipe"):
        find_recipe(str(tmp_path / "bad.json"))


def test_the_shipped_recipes_are_all_readable() -> None:
    assert {"embedded", "wikitext", "pile", "c4", "ultrachat"} <= set(recipe_names())
    for name in recipe_names():
        recipe = find_recipe(name)
        assert (recipe.dataset is None) == bool(recipe.sources)


def test_the_embedded_text_is_varied_and_its_held_out_part_is_its_own(prompter: Prompter) -> None:
    recipe = find_recipe("embedded")
    sizes = {path.name: path.stat().st_size for path in recipe.sources}
    assert 400_000 < sum(sizes.values()) < 700_000  # it ships in the wheel
    assert len(sizes) >= 7
    assert recipe.heldout is not None
    assert recipe.heldout not in recipe.sources
    rows = build_rows(recipe, prompter, 40, 512, 0, 4)
    assert rows.ids.shape == (40, 512)
    # every prefix of the rows holds every large source: encyclopedic prose, code and the languages are in any forty
    text = " ".join(prompter.tokenizer.decode(row) for row in rows.ids.tolist())
    assert any(character.isalpha() and character >= "\u0370" for character in text)  # other scripts than Latin
    assert "return" in text


def test_a_wheel_would_carry_the_data() -> None:
    folder = data_folder()
    assert (folder / "recipes" / "embedded.json").is_file()
    assert (folder / "text" / "heldout.txt").is_file()


# SHA-256 of the calibration rows and of the held-out ones, without and with a chat template: artifacts that were made
# of the embedded text are resumed, and measured again, by them.
EMBEDDED = {
    (8, 32, 0, 4): ("1dc6abc0fe677c96", "4487d90bbb9f9848", "b89ab912571f0df8"),
    (24, 40, 3, 16): ("e7c307c503079e8f", "37926f770e583ea8", "f1bb8dd857cb642d"),
    (128, 512, 0, 16): ("3eb5da6741f27733", "94d5d5c083c40f93", "6a457a55aab4fef7"),
    (1000, 64, 7, 8): ("60689b536fa842d6", "0c9ad7b1c8502010", "ce5be6fb3a1c1c40"),
}


@pytest.mark.slow
@pytest.mark.parametrize("asked", sorted(EMBEDDED))
def test_the_embedded_rows_stay_what_they_are(
    asked: tuple[int, int, int, int], prompter: Prompter, chat_prompter: Prompter
) -> None:
    plain, chat, heldout = EMBEDDED[asked]
    for used, expected in ((prompter, plain), (chat_prompter, chat)):
        rows = build_rows(find_recipe("embedded"), used, *asked)
        assert (rows.text_sha256[:16], rows.heldout_sha256[:16]) == (expected, heldout)
        assert (rows.description, rows.notes, rows.skipped) == ("embedded", (), "")


FILES = {
    "a.txt": ("8ba38b9db344cb63", "e55f90cfad5d2227"),
    "b.jsonl": ("9271a46ee17ea0bf", "b896f8cc84455095"),
}


def test_rows_of_files_stay_what_they_are(tmp_path: Path, chat_prompter: Prompter) -> None:
    (tmp_path / "a.txt").write_bytes(b"".join(b"%d. some words\r\nand an old\r mac\n" % i for i in range(300)))
    write_jsonl(tmp_path / "b.jsonl", *({"prompt": f"ask {i}", "response": "an answer " * i} for i in range(60)))
    found = {
        name: build_rows(find_recipe(str(tmp_path / name)), chat_prompter, 24, 40, 3, 16)
        for name in ("a.txt", "b.jsonl")
    }
    assert {name: (rows.text_sha256[:16], rows.heldout_sha256[:16]) for name, rows in found.items()} == FILES


def conversations(*turns: list[tuple[str, str]]) -> list[dict[str, object]]:
    return [{"messages": [{"role": role, "content": content} for role, content in one]} for one in turns]


def test_what_the_template_refuses_is_named_by_file_and_line(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "chat", chat=True)
    template = tmp_path / "chat" / "chat_template.jinja"
    odd = "{% if messages|length == 3 %}{{ raise_exception('odd turns') }}{% endif %}"
    template.write_text(odd + template.read_text())
    chat_prompter = Prompter(tmp_path / "chat")
    good = [("user", "hello there, how are you today"), ("assistant", "good day, and how are you")]
    refused = [("user", "x"), ("user", "y"), ("user", "z")]
    path = write_jsonl(tmp_path / "t.jsonl", *conversations(*[good] * 20), *conversations(refused))
    recipe = find_recipe(str(path))
    rows = build_rows(recipe, chat_prompter, 8, 16, 0, 2)
    assert rows.skipped.startswith(f"1 of 21 rows were skipped: {path}, line 21: ")
    assert "odd turns" in rows.skipped
    with pytest.raises(GemmaAwqError, match=r"t.jsonl, line 21: .*odd turns"):
        build_rows(recipe, chat_prompter, 8, 16, 0, 2, strict=True)
    write_jsonl(path, *conversations(refused, refused))
    with pytest.raises(GemmaAwqError, match=r"no usable row: .*line 1: .*line 2: "):
        build_rows(recipe, chat_prompter, 8, 16, 0, 2)


def test_a_bad_row_is_left_out_said_and_an_error_if_strict(tmp_path: Path, prompter: Prompter) -> None:
    good = {"text": "words of mine " * 20}
    path = write_jsonl(tmp_path / "t.jsonl", good, {"body": "x"}, good, 3)
    rows = build_rows(find_recipe(str(path)), prompter, 8, 16, 0, 2)
    assert rows.skipped.startswith("2 of 4 rows were skipped: ")
    assert "line 2 has no text in a known form; it has body." in rows.skipped
    without = write_jsonl(tmp_path / "u.jsonl", good, good)
    assert rows.text_sha256 == build_rows(find_recipe(str(without)), prompter, 8, 16, 0, 2).text_sha256
    with pytest.raises(GemmaAwqError, match="line 2 "):
        build_rows(find_recipe(str(path)), prompter, 8, 16, 0, 2, strict=True)
    write_jsonl(path, {"text": "x"}, {"body": "x"}, {"body": "x"})
    with pytest.raises(GemmaAwqError, match=r"too short: .* 2 of 3 rows were skipped") as error:
        build_rows(find_recipe(str(path)), prompter, 8, 16, 0, 2)
    assert "--text-column" in error.value.hint  # what helps: most rows are of another form


@pytest.mark.slow
def test_of_a_long_text_no_more_is_tokenized_than_is_needed(
    tmp_path: Path, prompter: Prompter, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.txt"
    path.write_text("".join(f"{i:09d} some words of a long text\n" for i in range(100_000)))  # 3.9 MB
    read = 0
    ids = prompter.ids

    def counting(text: str) -> list[int]:
        nonlocal read
        read += len(text)
        return ids(text)

    monkeypatch.setattr(prompter, "ids", counting)
    rows = [build_rows(find_recipe(str(path)), prompter, 8, 64, seed, 6) for seed in (0, 0, 1)]
    assert read < 3 * 600_000
    assert rows[0].ids.shape == (8, 64)
    assert rows[0].text_sha256 == rows[1].text_sha256 != rows[2].text_sha256
    # a text that gives few tokens for its size is read on
    monkeypatch.setattr(prompter, "ids", lambda text: ids(text[: len(text) // 100]))
    assert build_rows(find_recipe(str(path)), prompter, 200, 64, 0, 6).ids.shape == (200, 64)


def test_a_folder_and_what_is_left_out_of_it(tmp_path: Path, prompter: Prompter) -> None:
    (tmp_path / "texts").mkdir()
    for number in range(40):
        (tmp_path / "texts" / f"{number}.txt").write_text("short")  # no file alone fills a row
    (tmp_path / "texts" / "x.pdf").write_text("x")
    rows = build_rows(find_recipe(str(tmp_path / "texts")), prompter, 8, 32, 0, 2)
    assert rows.description == "texts (folder of 40 files)"
    assert rows.notes == (f"Not read in {tmp_path / 'texts'}: x.pdf.",)
    assert rows.ids.shape == (8, 32)


def test_the_command_says_what_it_skips_and_refuses_rows_beyond_the_context(
    tmp_path: Path, checkpoints: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", *({"text": "words of mine " * 20} for _ in range(9)), {"body": "x"})
    command = ["quantize", str(checkpoints("gemma")), "--calibration", str(path), "--device", "cpu", "--dry-run"]
    command += ["--group-size", "32", "-o", str(tmp_path / "out")]
    assert main([*command, "--seq-len", "40"]) == 0
    assert "warning: 1 of 10 rows were skipped: " in capsys.readouterr().err
    assert main([*command, "--seq-len", "40", "--strict"]) == 1
    assert "line 10 has no text in a known form; it has body" in capsys.readouterr().err
    assert main([*command, "--seq-len", "256"]) == 0
    assert main([*command, "--seq-len", "257"]) == 2
    assert "--seq-len 257 is more than this model's context of 256 tokens" in capsys.readouterr().err
