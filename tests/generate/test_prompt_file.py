"""Prompts in files and on standard input: read however they are named and encoded, or refused with their line."""

import gzip
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gemma_awq_cli.cli import stdin_prompt
from gemma_awq_cli.cli.stdin_prompt import read_prompt
from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.generate.prompt_file import read_prompts

BOM = b"\xef\xbb\xbf"
MESSAGES = [{"role": "user", "content": "Hi"}]
ROWS = [{"prompt": "one\u2028still one"}, {"messages": MESSAGES}]
READ = ["one\u2028still one", MESSAGES]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", LINES),
        ("a.JSONL", LINES),
        ("a.Ndjson", LINES),
        ("a.jsonl", BOM + LINES.replace(b"\n", b"\r\n")),
        ("a.jsonl", LINES.replace(b"\n", b"\r")),
        ("a.json", json.dumps(ROWS, indent=1).encode()),
        ("a.JSON", LINES),
        ("a.json", json.dumps({"data": ROWS}).encode()),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("a.txt", LINES),
        ("a.txt", BOM + LINES),
        ("a", LINES),
        ("a.txt.gz", gzip.compress(LINES, mtime=0)),
        ("a.jsonl", LINES.replace(b'"Hi"', b'[{"type": "text", "text": "Hi"}]')),
    ],
)
def test_rows_of_prompts_are_read_whatever_the_file_is_called(name: str, data: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    assert read_prompts(tmp_path / name) == READ


@pytest.mark.parametrize(
    ("data", "prompts"),
    [
        (BOM + b"one\ntwo\n", ["one", "two"]),
        (b"one\r\n\r\ntwo", ["one", "two"]),
        (b"one\rtwo\r", ["one", "two"]),
        ("a\u2028b\u0085c\x0bd\n".encode(), ["a\u2028b\u0085c\x0bd"]),
        (b'{"a": 1}\n{"prompt" is no JSON}\n[1]\n', ['{"a": 1}', '{"prompt" is no JSON}', "[1]"]),
    ],
)
def test_plain_prompts(data: bytes, prompts: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    assert read_prompts(tmp_path / "a.txt") == prompts


def test_a_table_of_prompts(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,prompt\n1,"two\nlines"\n2,b\n')
    assert read_prompts(tmp_path / "a.csv") == ["two\nlines", "b"]
    (tmp_path / "a.csv").write_text("question\nwhat\n")
    with pytest.raises(GemmaAwqError, match=r"line 2 needs either a `prompt` text or `messages`; it has question"):
        read_prompts(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        *(
            ("a.jsonl", line)
            for line in (
                b'{"prompt": 3}', b'{"prompt": ""}', b'{"prompt": ["x"]}', b"{}", b"3", b"null", b"[]", b"{", b"NaN",
                b'{"prompt": "x", "messages": [{"role": "user", "content": "x"}]}', b'{"prompt": "caf\xe9"}',
                b'{"prompt": "\\ud800"}', b'{"prompt": "\\u0000"}', b'{"prompt": "\0"}', b"9" * 5000, b"[" * 9999,
                b'{"messages": []}', b'{"messages": "x"}', b'{"messages": [{"role": "user"}]}',
                b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
            )
        ),
        ("a.txt", b"caf\xe9"),
        ("a.txt", b"a\0b"),
        ("a.txt", b"plain"),
    ],
)  # fmt: skip
def test_a_bad_prompt_is_an_error_with_its_line(name: str, line: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b'{"prompt": "x"}\n\n' + line + b"\n")
    with pytest.raises(GemmaAwqError, match=rf"{name}, line 3\b"):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_utf16_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(LINES.decode().encode("utf-16"))
    with pytest.raises(GemmaAwqError, match="UTF-16"):
        read_prompts(tmp_path / name)


def test_a_pipe_of_prompts_is_read_and_what_never_ends_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    os.write(writer, LINES)
    os.close(writer)
    assert read_prompts(Path(f"/dev/fd/{reader}")) == READ
    os.close(reader)
    with pytest.raises(GemmaAwqError, match="more than"):
        read_prompts(Path("/dev/zero"))
    monkeypatch.setattr("gemma_awq_cli.generate.prompt_file.INPUT_BYTES", 100)
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_text('{"prompt": "words"}\n' * 50)
        with pytest.raises(GemmaAwqError, match="more than 100 bytes"):
            read_prompts(tmp_path / name)


class Stdin:
    def __init__(self, data: bytes) -> None:
        self.buffer = io.BytesIO(data)


@pytest.mark.parametrize(
    ("data", "prompt"),
    [
        (b"Hello\n", "Hello"),
        (BOM + b"Hello\r\n", "Hello"),
        (b"one\r\ntwo\r\n", "one\ntwo"),
        (b"one\rtwo\r", "one\ntwo"),
        (b"one\n\n", "one\n"),
        ("a\u2028b\u0085".encode(), "a\u2028b\u0085"),
    ],
)
def test_a_prompt_on_standard_input(data: bytes, prompt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(data))
    assert read_prompt("-") == prompt


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "is empty"),
        (b"\n", "is empty"),
        (b"one\ncaf\xe9", "not UTF-8: byte 0xe9 in line 2"),
        (b"\xed\xa0\x80", "not UTF-8"),
        (b"one\0", "NUL character in line 1"),
        ("Hello".encode("utf-16"), "UTF-16"),
        (b"x" * 101, "more than 100 bytes"),
        (None, "closed"),
    ],
)
def test_standard_input_that_is_no_prompt(data: bytes | None, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stdin_prompt, "STDIN_BYTES", 100)
    stdin: Any = None if data is None else Stdin(data)
    monkeypatch.setattr(sys, "stdin", stdin)
    with pytest.raises(GemmaAwqError, match=says):
        read_prompt(None)


def test_a_pipe_that_does_not_end_takes_no_memory() -> None:
    code = (
        "import resource, sys\nfrom gemma_awq_cli.cli.stdin_prompt import read_prompt\n"
        "from gemma_awq_cli.errors import GemmaAwqError\n"
        "resource.setrlimit(resource.RLIMIT_AS, (400 << 20, 400 << 20))\n"
        "try:\n    read_prompt('-')\nexcept GemmaAwqError as error:\n    print(error.message)\n"
    )
    with open("/dev/zero", "rb") as endless:
        done = subprocess.run([sys.executable, "-c", code], stdin=endless, capture_output=True, text=True, timeout=60)
    assert "which no Gemma's context holds" in done.stdout, done.stderr


def test_an_empty_file_holds_no_prompt(tmp_path: Path) -> None:
    for name, data in (("a.txt", BOM + b"\r\n"), ("a.jsonl", b"\n"), ("a.json", b"[]"), ("a.csv", b"prompt\n")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UsageError, match="has no prompts"):
            read_prompts(tmp_path / name)
