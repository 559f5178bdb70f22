"""The chat as a person meets it: a real terminal (a pty), keys typed into it, what comes back."""

import json
import os
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gemma_awq_cli.cli.app import main
from tests.tiny import add_tokens, make_checkpoint

pytestmark = pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals are POSIX")
CTRL_C, CTRL_D = b"\x03", b"\x04"
# The command with a model that writes the same turn again and again.
SCRIPTED = """
import sys
from gemma_awq_cli.generate import running
from gemma_awq_cli.models.text.prompter import Prompter
from tests.generate.test_thinking import TURN, Scripted
running.open_engine = lambda checkpoint, *_: Scripted(Prompter(checkpoint.folder), [TURN] * 9)
from gemma_awq_cli.cli.app import main
sys.exit(main(sys.argv[1:]))
"""


class Terminal:
    """A chat in its own pseudo-terminal."""

    def __init__(
        self, folder: Path, *more: str, program: tuple[str, str] = ("-m", "gemma_awq_cli"), state: Path | None = None
    ) -> None:
        """state: where the history lies. With it the terminal is one that can do more than show lines."""
        import fcntl
        import pty
        import termios

        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        command = [sys.executable, *program, "run", "-m", str(folder), "--device", "cpu", *more]
        environment = {**os.environ, "TERM": "dumb", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}
        if state is not None:  # and one that does not say where its cursor is
            environment |= {"TERM": "xterm", "XDG_STATE_HOME": str(state), "PROMPT_TOOLKIT_NO_CPR": "1"}
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True,
            preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(slave)
        self._read = ""

    def type(self, keys: bytes) -> None:
        if keys == CTRL_C:  # a line editor that has just shown its prompt may not listen yet
            time.sleep(0.2)
        os.write(self._master, keys)

    def wait(self, text: str, seconds: float = 60) -> str:
        """What came since the last wait, up to and with `text`."""
        deadline = time.monotonic() + seconds
        while text not in self._read:
            if not select.select([self._master], [], [], max(0, deadline - time.monotonic()))[0]:
                raise AssertionError(f"{text!r} never came: {self._read!r}")
            try:
                self._read += os.read(self._master, 4096).decode(errors="replace").replace("\r\n", "\n")
            except OSError:  # the other end is closed
                raise AssertionError(f"ended before {text!r}: {self._read!r}") from None
        end = self._read.index(text) + len(text)
        seen, self._read = self._read[:end], self._read[end:]
        return seen

    def wait_for_editor(self) -> None:
        """Wait until the line editor listens: what it draws when a line ends has a prompt too."""
        self.wait("\x1b[?2004h")  # pastes are marked from here on
        self.wait(">>>")

    def is_cooked(self) -> bool:
        """Whether the terminal shows what is typed, line by line, as it does for a shell."""
        import termios

        flags = termios.tcgetattr(self._master)[3]
        return bool(flags & termios.ECHO and flags & termios.ICANON)

    def end(self) -> int:
        try:
            return self.process.wait(60)
        finally:
            os.close(self._master)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("chat") / "tiny", "gemma2", chat=True)


@pytest.fixture
def terminal(folder: Path) -> Iterator[Terminal]:
    opened = Terminal(folder, "--max-new-tokens", "4", "--system", "Be brief.")
    yield opened
    if opened.process.poll() is None:
        os.killpg(opened.process.pid, signal.SIGKILL)
        opened.end()


@pytest.mark.slow
def test_a_message_that_the_model_cannot_be_given_is_refused_and_the_chat_goes_on(tmp_path: Path) -> None:
    """A token beyond the embedding, a template that refuses, one that fails: the earlier turns stay."""
    folder = make_checkpoint(tmp_path / "tiny", "gemma2", chat=True)
    add_tokens(folder, "<image_soft_token>")
    (folder / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{% if m.content == 'refuse' %}"
        "{{ raise_exception('not that') }}{% elif m.content == 'fail' %}{{ 1 / 0 }}{% endif %}\n{% endfor %}"
    )
    terminal = Terminal(folder, "--max-new-tokens", "4")
    terminal.wait(">>> ")
    terminal.type(b"Hello\n")
    assert "cut at 4 tokens" in terminal.wait(">>> ")
    for said, answer in (
        (b"See <image_soft_token>", "error: The text contains the token '<image_soft_token>'"),
        (b"refuse", "rejects the messages: not that."),
        (b"fail", "line 1) fails with these messages: ZeroDivisionError: division by zero."),
    ):
        terminal.type(said + b"\n")
        assert answer in terminal.wait(">>> ")
    terminal.type(b"Again\n")
    assert "cut at 4 tokens" in terminal.wait(">>> ")
    terminal.type(f"/save {tmp_path / 'chat.jsonl'}\n".encode())
    assert "4 messages" in terminal.wait(">>> ")
    terminal.type(CTRL_D)
    assert terminal.end() == 0
    (saved,) = (tmp_path / "chat.jsonl").read_text(encoding="utf-8").splitlines()
    messages = json.loads(saved)["messages"]
    assert [message["content"] for message in messages if message["role"] == "user"] == ["Hello", "Again"]


@pytest.mark.slow
def test_a_chat_from_the_first_message_to_the_last(terminal: Terminal, tmp_path: Path) -> None:
    greeting = terminal.wait(">>> ")
    assert "Chat with tiny" in greeting
    assert "completes rather than answers" not in greeting
    terminal.type(b"Hello\n")
    terminal.wait(">>> ")
    terminal.type(b'"""\nfirst\n  """A docstring."""\nsecond\n"""\n')
    terminal.wait(">>> ")
    terminal.type(b"one\\\ntwo\n")
    terminal.wait(">>> ")
    terminal.type(b"/nonsense\n")
    assert "Unknown command: /nonsense" in terminal.wait(">>> ")
    terminal.type(b"half a line")
    terminal.wait("half a line")
    terminal.type(CTRL_C)  # the line is dropped, the chat goes on
    terminal.wait(">>> ")
    terminal.type(f"/save {tmp_path / 'saved.jsonl'}\n".encode())
    assert "6 messages" in terminal.wait(">>> ")
    terminal.type(b"/reset\n")
    assert "forgotten" in terminal.wait(">>> ")
    terminal.type(b"/system Be long.\n")
    assert "A new conversation" in terminal.wait(">>> ")
    terminal.type(b"/system\n")
    assert "System message: Be long." in terminal.wait(">>> ")
    terminal.type(b"/help\n")
    assert "/save FILE" in terminal.wait(">>> ")
    terminal.type(b"/exit\n")
    assert terminal.end() == 0
    (line,) = (tmp_path / "saved.jsonl").read_text(encoding="utf-8").splitlines()
    messages = json.loads(line)["messages"]
    assert [message["content"] for message in messages if message["role"] != "assistant"] == [
        "Be brief.", "Hello", "first\n  \"\"\"A docstring.\"\"\"\nsecond", "one\ntwo",
    ]  # fmt: skip


@pytest.mark.slow
def test_messages_are_taken_back_answered_again_and_loaded(terminal: Terminal, tmp_path: Path) -> None:
    def say(text: str) -> str:
        terminal.type(f"{text}\n".encode())
        terminal.wait(f"{text}\n")
        return terminal.wait(">>> ")

    terminal.wait(">>> ")
    assert "error: There is no answer yet." in say("/undo")
    answer = say("Hello")
    again = say("/regenerate")
    assert again == "(At temperature 0 the answer is the same each time.)\n" + answer
    say("Second " + "x" * 58)
    saved = tmp_path / "chat.jsonl"
    assert "4 messages" in say(f"/save {saved}")
    assert "Taken back: Second xxx" in (undone := say("/undo"))
    assert "x..." in undone
    assert "Taken back: Hello" in say("/undo")
    assert say("Hello") == answer
    assert "/load needs a file name" in say("/load")
    assert "error: " in say(f"/load {tmp_path}")
    assert f"4 messages, and a system message from {saved}" in say(f"/load {saved}")
    assert "Taken back: Second" in say("/undo")
    terminal.type(CTRL_D)
    assert terminal.end() == 0


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_and_not_the_chat(folder: Path) -> None:
    # transformers' modules: the decode paths of our own are done with 200 tokens before the key is pressed
    slow = Terminal(folder, "--max-new-tokens", "200", "--stop", "no such text", "--attn", "eager")
    slow.wait(">>> ")
    slow.type(b"Hello\n")
    slow.wait("Hello\n")
    time.sleep(0.2)
    slow.type(CTRL_C)
    slow.wait(">>> ")
    slow.type(b"/save /dev/null\n")  # it listens
    assert "exists" in slow.wait(">>> ")
    slow.type(CTRL_C)  # at an empty prompt it ends the chat
    assert slow.end() == 130


@pytest.mark.slow
def test_a_terminal_gets_a_line_editor_with_history(folder: Path, tmp_path: Path) -> None:
    """Lines are pasted as one message, and the next chat remembers it."""
    chat = Terminal(folder, "--max-new-tokens", "9", "--temperature", "2", "--seed", "1", state=tmp_path)
    chat.wait_for_editor()
    chat.type(b"\x1b[200~first\nsecond\\\n\x1b[201~third\r")
    assert "cut at 9 tokens" in chat.wait("limit)")
    chat.wait_for_editor()
    chat.type(b"/sa")
    chat.wait("/save FILE")  # the only command that begins so
    chat.type(b"\t")
    chat.wait("ve")
    chat.type(f"{tmp_path / 'saved.jsonl'}\r".encode())
    chat.wait("2 messages")
    chat.wait_for_editor()
    chat.type(b"half a message")
    chat.wait("half a message")
    chat.type(CTRL_C)
    chat.wait_for_editor()
    chat.type(CTRL_D)
    assert chat.end() == 0
    message = "first\nsecond\\\nthird"
    assert json.loads((tmp_path / "saved.jsonl").read_text())["messages"][0]["content"] == message
    (history,) = (path for path in tmp_path.rglob("*") if "history" in path.name)
    assert history.stat().st_mode & 0o777 == 0o600
    remembered = [json.loads(line) for line in history.read_text().splitlines()]
    assert remembered == [message, f"/save {tmp_path / 'saved.jsonl'}"]
    second = Terminal(folder, "--max-new-tokens", "9", "--no-history", state=tmp_path)
    second.wait_for_editor()
    second.type(b"secret\r")
    second.wait("limit)")
    second.wait_for_editor()
    assert not second.is_cooked()
    second.process.send_signal(signal.SIGTERM)
    second.wait("terminated")
    assert second.is_cooked()
    assert second.end() == 143
    assert "secret" not in history.read_text()


@pytest.mark.slow
def test_thoughts_are_seen_in_a_chat_and_told_from_the_answer(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "tiny", "gemma4_text", chat=True)
    thinking = Terminal(folder, "--think", program=("-c", SCRIPTED))
    thinking.wait(">>> ")
    for message in (b"Capital?", b"Where?"):
        thinking.type(message + b"\n")
        thinking.wait(message.decode() + "\n")
        assert thinking.wait(">>> ") == "Thinking:\nIs it Paris?\n\nIt is Paris.\n>>> "
    thinking.type(f"/save {tmp_path / 'chat.jsonl'}\n".encode())
    assert "4 messages" in thinking.wait(">>> ")
    thinking.type(CTRL_D)
    assert thinking.end() == 0
    (line,) = (tmp_path / "chat.jsonl").read_text(encoding="utf-8").splitlines()
    contents = [one["content"] for one in json.loads(line)["messages"]]
    assert contents == ["Capital?", "It is Paris.", "Where?", "It is Paris."]


@pytest.mark.slow
def test_ctrl_d_ends_a_base_models_chat(tmp_path: Path) -> None:
    base = Terminal(make_checkpoint(tmp_path / "base", "gemma"), "--max-new-tokens", "3")
    assert base.wait(">>> ").count("completes rather than answers") == 1
    base.type(b"Hello\n")
    assert "completes rather" not in base.wait(">>> ")
    base.type(b"/system Be brief.\n")
    assert "chat template" in base.wait(">>> ")
    base.type(CTRL_D)
    assert base.end() == 0


def test_a_chat_has_no_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert main(["run", "--json"]) == 2
    assert "--json" in capsys.readouterr().err
