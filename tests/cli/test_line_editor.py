"""The keys of a chat's line editor, without a terminal: a pipe of keys, and a screen that nobody sees."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from gemma_awq_cli.cli.chat_history import ChatHistory
from gemma_awq_cli.cli.line_editor import CommandCompleter, LineEditor

COMMANDS = {"/undo": "", "/load": "FILE", "/help": ""}
ENTER, ALT_ENTER, UP, CTRL_C, CTRL_D = "\r", "\x1b\r", "\x1b[A", "\x03", "\x04"


@pytest.fixture
def keys() -> Iterator[PipeInput]:
    with create_pipe_input() as pipe:
        yield pipe


def editor(keys: PipeInput, history: ChatHistory | None = None) -> LineEditor:
    return LineEditor(COMMANDS, history, DummyOutput(), keys)


def pasted(text: str) -> str:
    return f"\x1b[200~{text}\x1b[201~"


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("Hello" + ENTER, "Hello"),
        ("", None),
        (ENTER, ""),
        ("Hello\n", "Hello"),  # as some programs send Enter
        ("one\\" + ENTER + "two" + ENTER, "one\ntwo"),
        ("one" + ALT_ENTER + "two" + ENTER, "one\ntwo"),
        ('"""' + ENTER + "a\\" + ENTER + '  """A."""' + ENTER + '"""' + ENTER, 'a\\\n  """A."""'),
        ('"""one line"""' + ENTER, "one line"),
        (pasted("a\\\n\tb\r\nc") + "d" + ENTER, "a\\\n\tb\ncd"),
        (pasted("one\n\n") + ENTER, "one\n\n"),
        (pasted("/undo\n/undo\n") + "x" + ENTER, "/undo\n/undo\nx"),
        ("dropped" + CTRL_C + "kept" + ENTER, "kept"),
        ("12" + "\x02" + CTRL_D + ENTER, "1"),  # in a line Ctrl-D deletes
    ],
    ids=str,
)
def test_a_message(typed: str, message: str | None, keys: PipeInput) -> None:
    keys.send_text(typed + CTRL_D)
    if message is None:
        with pytest.raises(EOFError):
            editor(keys).read(">>> ")
    else:
        assert editor(keys).read(">>> ") == message


def test_ctrl_c_with_nothing_typed(keys: PipeInput) -> None:
    keys.send_text("dropped" + CTRL_C + CTRL_C)
    with pytest.raises(KeyboardInterrupt):
        editor(keys).read(">>> ")


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("/u", ["/undo"]),
        ("/", ["/undo", "/load ", "/help"]),
        ("say /u", []),
        ("/undo\n/", []),
        ("/load {}/sav", ["ed chat.jsonl"]),
        ("/help {}/sav", []),
    ],
)
def test_commands_and_their_files_are_completed(typed: str, completed: list[str], tmp_path: Path) -> None:
    (tmp_path / "saved chat.jsonl").touch()
    found = CommandCompleter(COMMANDS).get_completions(Document(typed.format(tmp_path)), CompleteEvent())
    assert [completion.text for completion in found] == completed


def test_arrow_keys_bring_back_the_messages_of_earlier_chats(keys: PipeInput, tmp_path: Path) -> None:
    path = tmp_path / "state" / "history"
    first = editor(keys, ChatHistory(path, pytest.fail))
    for text in ("one", pasted("two\nlines")):
        keys.send_text(text + ENTER)
        first.read(">>> ")
    second = editor(keys, ChatHistory(path, pytest.fail))
    keys.send_text(UP + UP + UP + ENTER)  # through both lines of the last one
    assert second.read(">>> ") == "one"


def test_without_a_file_the_chat_itself_is_remembered(keys: PipeInput) -> None:
    session = editor(keys)
    keys.send_text("one" + ENTER)
    session.read(">>> ")
    keys.send_text(UP + ENTER)
    assert session.read(">>> ") == "one"
