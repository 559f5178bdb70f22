"""What comes from outside: bytes, text and JSON with bounds, and errors that name the file."""

import io
import os
from pathlib import Path

import pytest

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.files import read_json
from gemma_awq_cli.system.failures import library_errors, system_errors
from gemma_awq_cli.system.json_input import parse_json
from gemma_awq_cli.system.reading import home_path, read_bytes
from gemma_awq_cli.system.text_input import byte_lines, decode, read_text

HINT = "Do something."


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("[" * 65 + "]" * 65, "nested too deeply"),
        ('{"a": ' * 65 + "1" + "}" * 65, "nested too deeply"),
        ("9" * 5000, "not valid JSON"),
        ("NaN", "NaN is not a JSON value"),
        ('{"a": -Infinity}', "-Infinity is not a JSON value"),
        (r'["\ud800"]', "half of a surrogate pair"),
        (r'{"a": [{"\uDfff": 1}]}', "half of a surrogate pair"),
    ],
)
def test_json_that_cannot_be_used_is_refused(text: str, says: str) -> None:
    with pytest.raises(GemmaAwqError, match=says) as error:
        parse_json(text, "x.json", HINT)
    assert "x.json" in error.value.message
    assert error.value.hint == HINT


@pytest.mark.parametrize("text", ["1", '"a"', r'"\ud83d\ude00"', "[[1]]", "[" * 64 + "]" * 64, "null"])
def test_json_that_is_sound_is_read(text: str) -> None:
    parse_json(text, "x.json", HINT)


def test_only_newlines_end_a_line() -> None:
    stream = io.BytesIO("a\u2028b\u0085c\x0bd\r\n\r\n \ne".encode())
    lines = [(number, line.decode()) for number, line in byte_lines(stream, "x", HINT) if line.strip()]
    assert lines == [(1, "a\u2028b\u0085c\x0bd"), (4, "e")]


def test_a_byte_order_mark_is_no_part_of_the_text() -> None:
    assert decode(b"\xef\xbb\xbfabc", "x") == "abc"
    for data, name in ((b"\xff\xfea\0", "UTF-16"), (b"\xff\xfe\0\0a\0\0\0", "UTF-32")):
        with pytest.raises(GemmaAwqError, match=f"x is {name}"):
            decode(data, "x")


def test_a_byte_that_is_not_utf8_is_named_with_its_line() -> None:
    with pytest.raises(GemmaAwqError, match="byte 0xe9 in line 2"):
        decode(b"ok\ncaf\xe9\n", "x")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_what_need_not_end_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(GemmaAwqError, match="cannot be read"):
            read_bytes(path, HINT)


def test_large_files_and_missing_ones_are_refused(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"x" * 11)
    with pytest.raises(GemmaAwqError, match="has 11 bytes; at most 10"):
        read_text(tmp_path / "large", HINT, limit=10)
    for name in ("none.json", "x" * 300):
        with pytest.raises(GemmaAwqError, match="does not exist"):
            read_json(tmp_path / name)


def test_errors_of_the_system_and_of_libraries_become_ours() -> None:
    with pytest.raises(GemmaAwqError, match="x cannot be read: File name too long"), system_errors("x", HINT):
        Path("y" * 300).stat()
    with pytest.raises(GemmaAwqError, match="x is odd: 'k'"), library_errors("x is odd", HINT):
        raise KeyError("k")
    with pytest.raises(AssertionError), library_errors("x is odd", HINT):
        raise AssertionError


def test_the_home_of_nobody_is_a_path_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert home_path("~/models") == Path("/home/me/models")
    assert home_path("models/~") == Path("models/~")
    assert not home_path("~no-such-user/models").exists()
