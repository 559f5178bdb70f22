"""What a user may name as a text: recipes, files, folders, hub datasets; none is taken for another."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
import yaml

from gemma_awq_cli.calibration_text.document_reading import BadRows
from gemma_awq_cli.calibration_text.hub_dataset import Dataset, read_dataset
from gemma_awq_cli.calibration_text.recipes import evaluation_documents, find_recipe, public_name, reported_name
from gemma_awq_cli.errors import GemmaAwqError, UsageError

BOM = b"\xef\xbb\xbf"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a folder of texts that is called as a hub dataset could be."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "a.txt").write_text("words of mine")
    return tmp_path


@pytest.mark.parametrize("asked", ["owner/name", "./owner/name", "owner/name/", "owner"])
def test_a_folder_that_is_here_is_no_hub_dataset(asked: str, here: Path) -> None:
    recipe = find_recipe(asked)
    assert recipe.dataset is None
    assert recipe.description() == f"{Path(asked).name} (folder of 1 file)"
    assert [d.content for d in evaluation_documents(recipe, None).documents] == ["words of mine"]
    with pytest.raises(UsageError, match="need a hub dataset"):
        find_recipe(asked, split="train")
    assert find_recipe(asked, text_column="body").column == "body"


def test_a_dataset_that_a_recipe_names_is_not_read_from_a_folder(here: Path) -> None:
    with pytest.raises(GemmaAwqError, match="is a file or a folder here") as error:
        read_dataset(Dataset("owner/name"), 10, BadRows())
    assert "./owner/name" in error.value.hint


@pytest.mark.parametrize(
    ("asked", "said", "published"),
    [
        ("owner/name", "./owner/name", "name"),
        ("owner", "owner", "owner"),
        ("./owner/name/", "./owner/name/", "name"),
        ("owner/name/a.txt", "owner/name/a.txt", "a.txt"),
        ("other/dataset", "other/dataset", "other/dataset"),
        ("embedded", "embedded", "embedded"),
        ("self", "self", "self"),
        ("a/b.JSONL", "a/b.JSONL", "b.JSONL"),
        ("a/b.csv.gz", "a/b.csv.gz", "b.csv.gz"),
        ("/home/me/text.parquet", "/home/me/text.parquet", "text.parquet"),
        ("~/texts", "~/texts", "texts"),
        ("C:\\\\me\\\\texts", "C:\\\\me\\\\texts", "texts"),
        ("c4 (hub dataset allenai/c4, en)", "c4 (hub dataset allenai/c4, en)", "c4 (hub dataset allenai/c4, en)"),
    ],
)
def test_reports_tell_folders_from_datasets_and_no_path_is_published(
    asked: str, said: str, published: str, here: Path
) -> None:
    assert reported_name(asked) == said
    assert public_name(said) == published


def test_this_folder_has_a_name(here: Path) -> None:
    assert public_name(reported_name(".")) == here.name
    assert find_recipe(".").name == here.name


@pytest.mark.parametrize(
    "asked",
    [
        "", " ", "owner/nme", ".x/y",
        "a/b/c", "a\0b", "x" * 5000, "x/" * 3000, "~nobody-at-all/x", "/no/where", "../no", "no.CSV",
        "a/no.jsonl.gz", "owner/..x/", "https://huggingface.co/datasets/a/b", "a b/c", "-x/y", "../recipes/embedded",
    ],
)  # fmt: skip
def test_what_is_nothing_is_said_so(asked: str, here: Path) -> None:
    with pytest.raises(GemmaAwqError, match=r"does not exist|no calibration recipe") as error:
        find_recipe(asked)
    assert error.value.hint


@pytest.mark.parametrize("value", [[], {}, 3, True, "", " ", ["x"], {"a": "b"}])
@pytest.mark.parametrize("key", ["about", "heldout", "dataset", "config", "split", "text_column", "evaluation_split"])
def test_a_recipe_of_other_types_is_an_error_with_its_key(key: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words")
    base = {"dataset": "a/b"} if key in ("dataset", "config", "split") else {"texts": ["a.txt"]}
    (tmp_path / "mine.json").write_text(json.dumps({**base, key: value}))
    with pytest.raises(GemmaAwqError, match=rf"mine.json.*{key}"):
        find_recipe(str(tmp_path / "mine.json"))


@pytest.mark.parametrize(
    "texts", ["a.txt", 3, None, [], [3], [None], [""], {"a": "a.txt"}, ["a.txt", ["a.txt"]], ["a\0b"], ["~nobody-x/a"]]
)
def test_texts_of_a_recipe_are_a_list_of_names(texts: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words")
    (tmp_path / "mine.json").write_text(json.dumps({"about": "mine", "texts": texts}))
    with pytest.raises(GemmaAwqError, match=r"mine.json.* (texts|names)"):
        find_recipe(str(tmp_path / "mine.json"))


@pytest.mark.parametrize("dataset", ["name", "a/b/c", "/a", "../a", "a/", "a b/c"])
def test_a_dataset_of_a_recipe_is_an_id(dataset: str, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(json.dumps({"dataset": dataset}))
    with pytest.raises(GemmaAwqError, match="must be an id owner/name"):
        find_recipe(str(tmp_path / "mine.json"))


@pytest.mark.parametrize("content", [b"[1", b"{", b"\xff\xfe{\0}\0", b"caf\xe9", b'{"texts": ' + b"[" * 9999])
def test_a_json_file_that_is_neither_recipe_nor_data(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "mine.JSON").write_bytes(content)
    with pytest.raises(GemmaAwqError, match=r"mine\.JSON"):
        evaluation_documents(find_recipe(str(tmp_path / "mine.JSON")), None)


def test_a_recipe_may_name_files_of_all_kinds_and_folders(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.csv").write_text("text\none\n")
    (tmp_path / "b.txt").write_bytes(BOM + b"two\r\n")
    (tmp_path / "mine.json").write_bytes(BOM + json.dumps({"texts": ["texts", str(tmp_path / "b.txt")]}).encode())
    documents = evaluation_documents(find_recipe(str(tmp_path / "mine.json")), None).documents
    assert [document.content for document in documents] == ["one", "two\n"]


def test_data_in_json_is_no_recipe(tmp_path: Path) -> None:
    for name, value in (("a", [{"text": "x"}]), ("b", {"data": [{"text": "x"}]}), ("c", {"text": "x"})):
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
        documents = evaluation_documents(find_recipe(str(tmp_path / f"{name}.json")), None).documents
        assert [document.content for document in documents] == ["x"]


def test_rows_that_are_left_out_are_said_in_what_is_measured_on(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"no": 1}\n')
    text = evaluation_documents(find_recipe(str(tmp_path / "a.jsonl")), None)
    assert text.description == "a.jsonl, without 1 of 2 rows"
    (tmp_path / "a.jsonl").write_text('{"no": 1}\n{"no": 1}\n')
    with pytest.raises(GemmaAwqError, match="no usable row"):
        evaluation_documents(find_recipe(str(tmp_path / "a.jsonl")), None)


def test_a_text_too_long_to_measure_on_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemma_awq_cli.calibration_text.recipes.EVALUATED", 100)
    (tmp_path / "a.txt").write_text("words\n" * 400_000)
    recipe = find_recipe(str(tmp_path / "a.txt"))
    with pytest.raises(GemmaAwqError, match="more than 100 bytes") as error:
        evaluation_documents(recipe, None)
    assert "--windows" in error.value.hint


def raising(error: BaseException) -> Callable[..., Any]:
    def load(*_: Any, **__: Any) -> Any:
        yield {"text": "x"}
        raise error

    return load


@pytest.mark.parametrize(
    "error",
    [
        OSError("x"), ValueError("x"), KeyError("x"), TypeError("x"), NotImplementedError("x"), ImportError("x"),
        RecursionError("x"), IndexError("x"), UnicodeDecodeError("utf-8", b"x", 0, 1, "x"), AttributeError("x"),
        datasets.exceptions.DatasetGenerationError("x"), pyarrow.lib.ArrowCapacityError("x"), yaml.YAMLError("x"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("when", ["opening", "reading"])
def test_whatever_the_libraries_raise_over_a_dataset_is_an_error_of_it(
    when: str, error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)

    def load(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", raising(error) if when == "reading" else load)
    with pytest.raises(GemmaAwqError, match="dataset owner/name cannot be read"):
        read_dataset(Dataset("owner/name"), None, BadRows())


def test_a_bug_of_ours_is_no_error_of_a_dataset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", raising(AssertionError("ours")))
    with pytest.raises(AssertionError):
        read_dataset(Dataset("owner/name"), None, BadRows())
