"""Texts as people have them: every form and kind is read, what is none is named, and no size takes the memory."""

import csv
import gzip
import io
import json
import os
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from gemma_awq_cli.calibration_text import document_files, document_reading
from gemma_awq_cli.calibration_text.document_forms import Document, document_from_row
from gemma_awq_cli.calibration_text.document_reading import BadRows, Reading, read_documents
from gemma_awq_cli.errors import GemmaAwqError

USER, ANSWER = {"role": "user", "content": "ask"}, {"role": "assistant", "content": "told"}
SYSTEM = {"role": "system", "content": "be brief"}
PART = {"type": "text", "text": "as"}
ALL = 1 << 30


def read(path: Path, characters: int = ALL, **more: Any) -> list[Any]:
    return [document.content for document in read_documents(path, Reading(characters, **more))]


def drawn(path: Path, characters: int, seed: int = 0, **more: Any) -> tuple[list[Document], Reading]:
    reading = Reading(characters, random.Random(seed), **more)
    return read_documents(path, reading), reading


@pytest.mark.parametrize(
    ("row", "content"),
    [
        ({"text": "words"}, "words"),
        ({"content": "words"}, "words"),
        ({"text": "words", "messages": [USER]}, "words"),
        ("words", "words"),
        ([USER, ANSWER], [USER, ANSWER]),
        ({"text": None, "messages": [USER, ANSWER]}, [USER, ANSWER]),
        *(
            ({asked: "ask", told: "told", "id": 7}, [USER, ANSWER])
            for asked, told in (
                ("prompt", "response"),
                ("prompt", "completion"),
                ("question", "answer"),
                ("query", "response"),
                ("instruction", "output"),
                ("instruction", "response"),
            )
        ),
        ({"prompt": [USER], "completion": [ANSWER]}, [USER, ANSWER]),
        ({"prompt": "ask", "response": "told", "system": "be brief"}, [SYSTEM, USER, ANSWER]),
        ({"instruction": "ask", "input": "", "output": "told"}, [USER, ANSWER]),
        ({"instruction": "ask", "input": "this", "output": "told"}, [{**USER, "content": "ask\n\nthis"}, ANSWER]),
        ({"instruction": "ask", "output": "told", "system": "be brief"}, [SYSTEM, USER, ANSWER]),
        ({"messages": [USER, ANSWER]}, [USER, ANSWER]),
        ({"messages": [{**USER, "name": "me", "weight": 0}]}, [USER]),
        ({"messages": [{"role": "user", "content": [PART, {"type": "text", "text": "k"}]}]}, [USER]),
        ({"messages": [{"role": "user", "content": ["ask"]}]}, [USER]),
        ({"conversation": [USER]}, [USER]),
        ({"conversations": [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "told"}]}, [USER, ANSWER]),
        ({"conversations": [{"from": "User", "value": "ask"}, {"from": "ChatGPT", "value": "told"}]}, [USER, ANSWER]),
        (
            {"conversations": [{"from": "system", "value": "be brief"}, {"from": "human", "value": "ask"}]},
            [SYSTEM, USER],
        ),
        ({"conversations": [{"from": "human", "value": "ask"}], "system": "be brief"}, [SYSTEM, USER]),
        ({"text": "a\u2028b\u0085c\x0bd\ufeffe"}, "a\u2028b\u0085c\x0bd\ufeffe"),
    ],
)
def test_forms_that_are_read(row: Any, content: Any) -> None:
    assert document_from_row(row, None, "here").content == content


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"body": "x", "title": "y"}, "it has body, title"),
        ({}, "it has no keys"),
        ({f"k{i}": 1 for i in range(50)}, "and 38 more"),
        ({"\x1b]0;title\x07": 1}, r"it has \?\]0;title\?\."),
        ({"text": 3}, "it has text"),
        ({"text": ["a"]}, "it has text"),
        ({"messages": []}, "an empty list instead of messages"),
        ({"messages": ["x"]}, "message 1 is a string"),
        ({"messages": [USER, {"content": "x"}]}, "message 2 has no role"),
        ({"messages": [{"role": 3, "content": "x"}]}, "unknown role 3"),
        ({"messages": [{"role": "user", "content": None}]}, "message 1 has null as its content"),
        ({"messages": [{"role": "user", "content": [PART, {"type": "image_url"}]}]}, "part of type image_url"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}, "part of type image"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "part without text"),
        ({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [1]}]}, "message 2 has tool_calls"),
        ({"messages": [USER, {"role": "tool", "content": "x"}]}, "message 2 is a tool turn"),
        ({"conversations": [{"from": "function_call", "value": "x"}]}, "is a function_call turn"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "unknown role alien"),
        ({"conversations": [{"from": ["x"], "value": "x"}]}, "unknown role"),
        ({"conversations": [{"from": "human", "value": 3}]}, "a number as its content"),
        ({"text": "a\0b"}, "NUL character"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "surrogate"),
        (3, "is a number"),
        (None, "is null"),
        ([], "an empty list"),
        (b"bytes", "a value of type bytes"),
    ],
)
def test_what_is_no_text_is_named(row: Any, says: str) -> None:
    with pytest.raises(GemmaAwqError, match=says) as error:
        document_from_row(row, None, "t.jsonl, line 3")
    assert error.value.message.startswith("t.jsonl, line 3")
    assert error.value.hint


@pytest.mark.parametrize("value", [3, 1.5, True, None, {"a": 1}, b"x", [], [3], object()])
def test_a_named_column_of_another_type(value: Any) -> None:
    with pytest.raises(GemmaAwqError, match="here"):
        document_from_row({"body": value}, "body", "here")
    with pytest.raises(GemmaAwqError, match="no text column 'other'") as error:
        document_from_row({"body": value}, "other", "here")
    assert "body" in error.value.hint


ROWS = [{"text": 'first, with a "quote"\nand a line'}, {"text": "second \u2028 naïve 東京"}]
BOM = b"\xef\xbb\xbf"


def lines(rows: Any = ROWS) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(delimiter: str = ",", end: str = "\n") -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["id", "text"], delimiter=delimiter, lineterminator=end)
    writer.writeheader()
    writer.writerows({"id": number, **row} for number, row in enumerate(ROWS))
    return text.getvalue().encode()


def array(rows: Any = ROWS, **how: Any) -> bytes:
    return json.dumps(rows, **how).encode()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", lines()),
        ("a.JSONL", lines()),
        ("a.ndjson", lines()),
        ("a.jsonl", BOM + lines()),
        ("a.jsonl", lines(ROWS[:1]) + BOM + lines(ROWS[1:])),
        ("a.jsonl", lines().replace(b"\n", b"\r\n")),
        ("a.jsonl", lines().replace(b"\n", b"\r")),
        ("a.jsonl", b"\n \n" + lines().removesuffix(b"\n")),
        ("a.jsonl.gz", gzip.compress(BOM + lines(), mtime=0)),
        ("a.json", array()),
        ("a.Json", array(indent=2)),
        ("a.json", BOM + array(ensure_ascii=False, indent=1).replace(b"\n", b"\r\n")),
        ("a.json", b"\r\n\n" + array() + b"\n\n"),
        ("a.json", array({"version": "1", "data": ROWS})),
        ("a.json", array({"version": "1", "data": ROWS}, indent=2)),
        ("a.json", array({"data": ROWS}) + b"\n\n"),
        ("a.json", lines()),
        ("a.json.gz", gzip.compress(array(), mtime=0)),
        ("a.csv", table()),
        ("a.csv", BOM + table(end="\r\n")),
        ("a.csv", table(";")),
        ("a.csv", b"\n" + table("\t") + b"\n,\n"),
        ("a.tsv", table("\t")),
        ("a.CSV.GZ", gzip.compress(table(), mtime=0)),
    ],
)
def test_kinds_that_are_read(name: str, data: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    reading = [row["text"] for row in ROWS]
    assert read(tmp_path / name) == reading
    assert [document.content for document in drawn(tmp_path / name, 1000)[0]] == reading


@pytest.mark.parametrize(
    "data",
    [b"one\ntwo\n", BOM + b"one\ntwo\n", b"one\r\ntwo\r\n", b"one\rtwo\r"],
)
@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "a.md", "a.txt.gz"])
def test_a_plain_text_is_the_same_however_it_is_stored(name: str, data: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(gzip.compress(data, mtime=0) if name.endswith("gz") else data)
    assert read(tmp_path / name) == ["one\ntwo\n"]


def test_a_wide_field_and_many_small_rows(tmp_path: Path) -> None:
    wide = "words " * 100_000
    (tmp_path / "a.csv").write_text(f'text\n"{wide}"\nshort\n')
    assert read(tmp_path / "a.csv") == [wide, "short"]
    (tmp_path / "a.json").write_text(json.dumps([wide, *map(str, range(30_000))]))
    assert read(tmp_path / "a.json") == [wide, *map(str, range(30_000))]


def test_parquet_reads_only_the_columns_that_say_something(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    messages = [[USER, ANSWER], None]
    times = pyarrow.array([2**62, 1], pyarrow.timestamp("us"))  # beyond what Python's dates hold
    columns = {"when": times, "text": [None, "words"], "messages": messages, "blob": [b"\xff", None]}
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=1)
    assert read(path) == [[USER, ANSWER], "words"]
    for column, says in (("when", "not a valid parquet file"), ("blob", "type bytes"), ("none", "no text column")):
        with pytest.raises(GemmaAwqError, match=says):
            read(path, column=column, bad=BadRows(strict=True))


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.txt", "Größe".encode("latin-1"), "not UTF-8: byte 0xf6"),
        ("a.txt", "Größe".encode("utf-16"), "UTF-16"),
        ("a.txt", "word".encode("utf-16-le"), "NUL character in line 1"),
        ("a.txt", b"one\ntwo\0", "NUL character in line 2"),
        ("a.jsonl", lines().decode().encode("utf-16"), "UTF-16"),
        ("a.csv", table().decode().encode("utf-16"), "UTF-16"),
        ("a.json", array().decode().encode("utf-16"), "UTF-16"),
        ("a.json", array()[:-1], "end of the file after item 2"),
        ("a.json", array() + b",", "is not valid JSON"),
        ("a.json", b'["a" "b"]', "after item 1"),
        ("a.json", b'["a", "\xff"]', "not UTF-8"),
        ("a.json", b"[" * 100_000, "nested too deeply"),
        ("a.json", b"[" + b"9" * 5000 + b"]", "item 1 is not valid JSON"),
        ("a.json", b"", "not valid JSON"),
        ("a.json", b"{", "not valid JSON"),
        ("a.txt.gz", b"no gzip", "not a valid gzip file"),
        ("a.txt.gz", gzip.compress(b"words " * 9999, mtime=0)[:-20], "not a valid gzip file"),
        ("a.jsonl.gz", gzip.compress(lines(), mtime=0)[:-9], "not a valid gzip file"),
        ("a.csv.gz", gzip.compress(table(), mtime=0)[:20] + b"\0" * 20, "not a valid gzip file"),
        ("a.parquet", b"PAR1 no more", "not a valid parquet file"),
        ("a.parquet", b"", "not a valid parquet file"),
        ("a.csv", b'"text', "an invalid header"),
        ("a.pdf", b"%PDF", "not a supported text file"),
        ("a.txt.zip", b"PK", "not a supported text file"),
    ],
)
def test_files_that_cannot_be_read_are_named(name: str, data: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(GemmaAwqError, match=says) as error:
        read(tmp_path / name)
    assert name in error.value.message


@pytest.mark.parametrize(
    ("name", "good", "bad", "line"),
    [
        ("a.jsonl", b'{"text": "fine"}\n', bad, 3)
        for bad in (
            b'{"text": ', b'{"body": "x"}', b'{"text": "caf\xe9"}', b'{"text": "\\ud800"}', b'{"text": "\0"}', b"NaN",
            b"[" * 5000, b"9" * 5000, b'{"messages": [{"role": "tool", "content": "x"}]}', b'{"text": "\\u0000"}',
        )
    ]
    + [
        ("a.csv", b"fine,1\n", b"too,many,fields", 4),
        ("a.csv", b"fine,1\n", b"caf\xe9,1", 4),
        ("a.csv", b"fine,1\n", b'"a"b,1', 4),
    ],
)  # fmt: skip
def test_one_bad_row_is_skipped_counted_and_named(
    name: str, good: bytes, bad: bytes, line: int, tmp_path: Path
) -> None:
    head = b"text,id\n" if name == "a.csv" else b""
    path = tmp_path / name
    path.write_bytes(head + good * 2 + bad + b"\n" + good)
    reading = Reading(ALL)
    assert [document.content for document in read_documents(path, reading)] == ["fine"] * 3
    assert reading.bad.count == 1
    assert reading.bad.summary(3).startswith(f"1 of 4 rows were skipped: {path}, line {line}")
    with pytest.raises(GemmaAwqError, match=f"line {line}"):
        read(path, bad=BadRows(strict=True))


def test_a_file_of_bad_rows_alone_is_given_up_soon(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"title": "x"}\n' * 5000)
    with pytest.raises(GemmaAwqError, match=r"no usable row: .*line 1 has .* it has title") as error:
        read(path)
    assert "--text-column" in error.value.hint


def test_a_folder_is_all_its_texts(tmp_path: Path) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("secret")
    folder = tmp_path / "texts"
    (folder / "b" / "c").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / ".git" / "x.txt").write_text("hidden")
    (folder / "b" / "c" / "2.jsonl").write_bytes(lines())
    (folder / "1.txt").write_text("one")
    (folder / "z.CSV").write_bytes(table())
    (folder / "inside.txt").symlink_to("1.txt")
    (folder / "link.txt").symlink_to(outside)
    (folder / "up").symlink_to(tmp_path)
    (folder / "broken.txt").symlink_to("nowhere")
    for name in ("README.md", "x.pdf", ".env.txt"):
        (folder / name).write_text("x")
    os.mkfifo(folder / "pipe.txt")
    reading = Reading(ALL)
    texts = [row["text"] for row in ROWS]
    assert [d.content for d in read_documents(folder, reading)] == ["one", *texts, "one", *texts]
    assert reading.notes == [
        f"Not read in {folder}: .env.txt, .git/, README.md, broken.txt, link.txt, pipe.txt, up/, x.pdf."
    ]
    (folder / "bad.txt").write_bytes(b"\xff")
    assert len(read_documents(folder, reading)) == 6
    assert "bad.txt" in reading.bad.first[0].message
    with pytest.raises(GemmaAwqError, match=r"bad.txt"):
        read(folder, bad=BadRows(strict=True))
    (tmp_path / "empty").mkdir()
    with pytest.raises(GemmaAwqError, match="holds no text file"):
        read(tmp_path / "empty")


def test_a_folder_of_the_hubs_cache_is_read_through_its_links(tmp_path: Path) -> None:
    folder = tmp_path / "datasets--a--b" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (tmp_path / "datasets--a--b" / "blobs").mkdir()
    (tmp_path / "datasets--a--b" / "blobs" / "0123").write_bytes(lines())
    (folder / "train.jsonl").symlink_to("../../blobs/0123")
    assert len(read(folder)) == 2


MAKERS: dict[str, Callable[[Path, int], None]] = {
    "a.txt": lambda path, n: path.write_text("".join(f"{i:09d} some words\n" for i in range(n))) and None,
    "a.jsonl": lambda path, n: path.write_bytes(lines({"text": f"{i:09d} some words"} for i in range(n))) and None,
    "a.json": lambda path, n: path.write_bytes(array([{"text": f"{i:09d} some words"} for i in range(n)])) and None,
    "a.csv": lambda path, n: path.write_text("text\n" + "".join(f"{i:09d} some words\n" for i in range(n))) and None,
    "a.jsonl.gz": lambda path, n: (
        path.write_bytes(gzip.compress(lines({"text": f"{i:09d} some words"} for i in range(n)))) and None
    ),
    "a.txt.gz": lambda path, n: (
        path.write_bytes(gzip.compress("".join(f"{i:09d} some words\n" for i in range(n)).encode())) and None
    ),
    "a.parquet": lambda path, n: pyarrow.parquet.write_table(
        pyarrow.table({"text": [f"{i:09d} some words" for i in range(n)]}), path, row_group_size=5000
    ),
}


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_of_a_long_text_a_bounded_part_is_drawn_by_the_seed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document_reading, "BLOCK", 2048)
    path = tmp_path / name
    MAKERS[name](path, 40_000)  # 800 kB of text
    found, reading = drawn(path, 20_000, whole=50_000)
    assert not reading.complete
    assert not reading.bad.count
    assert 10_000 < sum(document.characters for document in found) < 60_000
    numbers = [int(line[:9]) for d in found for line in str(d.content).splitlines() if line.endswith("words")]
    assert len(set(numbers)) > 500
    blocks = name in ("a.txt", "a.jsonl", "a.parquet")  # the others are read from their beginning
    assert max(numbers) - min(numbers) > (15_000 if blocks else 5_000)  # not from one place alone
    again, _ = drawn(path, 20_000, whole=50_000)
    other, _ = drawn(path, 20_000, seed=1, whole=50_000)
    assert [d.content for d in found] == [d.content for d in again] != [d.content for d in other]
    # and from the beginning, to measure on
    first = Reading(20_000, whole=0)
    text = "\n".join(str(document.content) for document in read_documents(path, first))
    assert text.startswith("000000000 some words\n000000001")
    assert 15_000 < len(text) < 25_000
    assert not first.complete


def test_a_bad_line_far_inside_a_long_file_is_named_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(b'{"text": "%09d"}\n' % i if i % 100 else b'{"no": %d}\n' % i for i in range(60_000)))
    _, reading = drawn(path, 30_000, whole=30_000)
    text = path.read_text().split("\n")
    assert reading.bad.count > 3
    for error in reading.bad.first:
        number = int(error.message.split("line ")[1].split(" ")[0])
        assert text[number - 1].startswith('{"no"')


@pytest.mark.parametrize("data", [("東京" * 40_000).encode(), b"x" * 200_000, ("é " * 70_000).encode()])
def test_blocks_are_cut_between_characters(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    found, _ = drawn(tmp_path / "a.txt", 50_000, whole=50_000)
    assert sum(len(str(document.content).encode()) for document in found) > 30_000


def test_a_bomb_takes_neither_memory_nor_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_files, "UNPACKED_FREELY", 1 << 16)
    tracemalloc.start()
    for name, block in (("a.jsonl.gz", b"\n"), ("a.txt.gz", b"x"), ("a.json.gz", b" "), ("a.csv.gz", b"\n")):
        with gzip.open(tmp_path / name, "wb", compresslevel=1) as file:
            for _ in range(8):
                file.write(block * (1 << 20))
        if name == "a.txt.gz":
            assert sum(document.characters for document in drawn(tmp_path / name, 1000, whole=1 << 16)[0]) < 1 << 17
            continue
        with pytest.raises(GemmaAwqError, match=r"far too many for its size"):
            drawn(tmp_path / name, 1000, whole=1 << 16)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 << 20


def test_many_files_are_drawn_from_many(tmp_path: Path) -> None:
    for number in range(200):
        (tmp_path / f"{number:03d}.txt").write_text(f"{number:03d} word\n" * 1000)
    found, reading = drawn(tmp_path, 200_000, whole=200_000)
    assert not reading.complete
    assert len({str(document.where) for document in found}) > 15
    assert sum(document.characters for document in found) < 300_000


def test_what_need_not_end_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    (tmp_path / "b.txt").symlink_to("/dev/zero")
    for name in ("a.jsonl", "b.txt"):
        with pytest.raises(GemmaAwqError, match="not a regular file"):
            read(tmp_path / name)


def test_zeros_behind_a_gzip_file_are_padding_but_not_without_end(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"some words\n") + bytes(1000))
    assert [str(document.content) for document in read_documents(path, Reading(100))] == ["some words\n"]
    with path.open("r+b") as file:
        file.truncate(1 << 30)
    with pytest.raises(GemmaAwqError, match="is not a valid gzip file: too many zeros"):
        read_documents(path, Reading(100))
