"""The file of a chat's history: bounded, private, and whatever is in it."""

import json
import os
from pathlib import Path

import pytest

from gemma_awq_cli.cli.chat_history import HISTORY_BYTES, MESSAGE_BYTES, ChatHistory


def lines(path: Path) -> list[str]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_messages_come_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "history"
    for text in ("one", "two\nlines \u2028 \ud800", "ünï"):
        ChatHistory(path, pytest.fail).add(text)
    assert ChatHistory(path, pytest.fail).load() == ["one", "ünï"]  # half of a surrogate pair is no text


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX")
def test_only_the_owner_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "state" / "history"
    ChatHistory(path, pytest.fail).add("one")
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    path.chmod(0o644)
    ChatHistory(path, pytest.fail).load()
    assert path.stat().st_mode & 0o777 == 0o600


def test_it_stays_small(tmp_path: Path) -> None:
    path = tmp_path / "history"
    history = ChatHistory(path, pytest.fail)
    history.add("x" * MESSAGE_BYTES)
    assert not path.exists()
    message = "y" * (MESSAGE_BYTES // 2)
    while not path.exists() or path.stat().st_size <= HISTORY_BYTES:
        history.add(message)
    history.add("last")
    loaded = ChatHistory(path, pytest.fail).load()
    assert loaded[-1] == "last"
    assert set(loaded) == {message, "last"}
    assert HISTORY_BYTES // 3 < path.stat().st_size < HISTORY_BYTES * 2 // 3
    history.add("newer")
    assert lines(path) == [*loaded, "newer"]
    assert [file.name for file in tmp_path.iterdir()] == ["history"]
    if os.name == "posix":
        assert path.stat().st_mode & 0o777 == 0o600


def test_what_is_no_message_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "history"
    path.write_bytes(b'"good"\n{"a": 1}\n3\n\xff\n""\n"nul\\u0000"\nnot json\n' + b"[" * 9999 + b'\n"last"\n"half')
    assert ChatHistory(path, pytest.fail).load() == ["good", "last"]


@pytest.mark.skipif(os.name != "posix", reason="pipes are POSIX")
@pytest.mark.parametrize("kind", ["folder", "pipe", "below a file"])
def test_a_file_that_cannot_be_used_is_reported_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "history"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.touch()
        path = path / "history"
    warnings: list[str] = []
    history = ChatHistory(path, warnings.append)
    assert history.load() == []
    history.add("one")
    history.add("two")
    assert len(warnings) == 1
    assert str(path) in warnings[0]
