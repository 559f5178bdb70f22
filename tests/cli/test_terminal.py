"""What a stranger's text does to a terminal: it is shown, and nothing of it is obeyed."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gemma_awq_cli.cli import terminal
from gemma_awq_cli.cli.app import main
from gemma_awq_cli.cli.console import Output
from gemma_awq_cli.cli.streams import standard_streams
from gemma_awq_cli.errors import GemmaAwqError

Capture = pytest.CaptureFixture[str]

HOSTILE = {
    "colour": "\x1b[31mred",
    "clear": "\x1b[2J\x1b[H",
    "title": "\x1b]0;owned\x07",
    "clipboard": "\x1b]52;c;cm0gLXJmIH4=\x1b\\",
    "link": "\x1b]8;;http://evil\x1b\\click\x1b]8;;\x1b\\",
    "device": "\x1bP$q\x1b\\",
    "c1": "\x9b31m\x9d0;x\x9c",
    "del": "a\x7fb",
    "backspace": "safe\b\b\b\bevil",
    "return": "real\rfake",
    "bell": "\a",
    "feeds": "\v\f",
    "nul": "a\0b",
    "override": "gpj.\u202eexe",
    "isolate": "\u2066x\u2069",
    "zero width": "ge\u200bmma\u2060\ufeff",
    "filler": "a\u3164b\u115fc\ufe0f",
    "tags": "\U000e0041\U000e0042",
    "separators": "a\u2028b\u2029c\x85d",
    "bytes": "name-\udcff\udc80",
}
OBEYED = {chr(code) for code in (*range(32), *range(127, 160))} - {"\n", "\t"}
UNSEEN = OBEYED | set("\u202a\u202b\u202d\u202e\u2066\u2069\u200b\u2060\ufeff\u3164\u115f\ufe0f\u2028\u2029\U000e0041")


class Screen(io.StringIO):
    """A terminal, or a pipe, that keeps what it is given."""

    encoding = "utf-8"

    def __init__(self, seen: bool) -> None:
        super().__init__()
        self.seen = seen

    def isatty(self) -> bool:
        return self.seen


@pytest.fixture
def screens(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], tuple[Screen, Screen]]]:
    """Standard output and error as terminals or as pipes, for one command."""
    contexts: list[Any] = []

    def make(seen: bool) -> tuple[Screen, Screen]:
        streams = Screen(seen), Screen(seen)
        monkeypatch.setattr(sys, "stdout", streams[0])
        monkeypatch.setattr(sys, "stderr", streams[1])
        monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 1000))
        monkeypatch.setenv("NO_COLOR", "1")
        monkeypatch.setenv("TERM", "dumb")  # no escape sequence of our own
        contexts.append(standard_streams())
        contexts[-1].__enter__()
        return streams

    yield make
    for context in contexts:
        context.__exit__(None, None, None)


# Every way to say something to a person; `every_method_is_walked` makes sure that none is forgotten.
SAID: dict[str, Callable[[Output, str], object]] = {
    "note": lambda out, text: out.note(text),
    "warning": lambda out, text: out.warning(text),
    "violation": lambda out, text: out.violation(text),
    "error": lambda out, text: out.error(GemmaAwqError(text, text)),
    "traceback": lambda out, text: out.traceback(ValueError(text)),
    "usage": lambda out, text: out.usage(text),
    "confirm": lambda out, text: out.confirm(text),
    "ask": lambda out, text: out.ask(text),
    "table": lambda out, text: out.table(text, ((text, text),), (text, text)),
    "progress": lambda out, text: out.progress(text, 1).__enter__().step(),
    "piece": lambda out, text: out.piece(text),
    "thought": lambda out, text: out.thought(text),
    "result": lambda out, text: out.result(text),
    "document": lambda out, text: out.document({text: text}),
    "result_table": lambda out, text: out.result_table(text, ((text, text),), (text, text)),
    "result_facts": lambda out, text: out.result_facts([(text, [(text, text)])]),
}
RESULTS = {"piece", "result"}  # exact bytes where they do not go to a terminal


def test_every_method_is_walked() -> None:
    assert {name for name in vars(Output) if not name.startswith("_")} == {*SAID, "console", "drawn_on"}


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("method", SAID)
def test_nothing_that_is_quoted_is_obeyed(
    method: str, seen: bool, screens: Callable[[bool], tuple[Screen, Screen]]
) -> None:
    stdout, stderr = screens(seen)
    for text in HOSTILE.values():
        SAID[method](Output(), text)
    written = stdout.getvalue() + stderr.getvalue()
    if method == "progress" and not seen:
        assert written == ""
        return
    if method in RESULTS and not seen:
        assert stdout.getvalue() == "".join(text + "\n" * (method == "result") for text in HOSTILE.values())
        return
    assert not (OBEYED if method in ("piece", "thought") else UNSEEN) & set(written)
    assert not any("\ud800" <= character <= "\udfff" for character in written)
    if method not in ("document", "progress"):
        assert r"\x1b[31mred" in written  # it is seen


def test_every_standard_error_is_filtered_whoever_writes_it(
    screens: Callable[[bool], tuple[Screen, Screen]],
) -> None:
    import logging

    for seen in (True, False):
        _, stderr = screens(seen)
        for text in HOSTILE.values():
            logging.StreamHandler(sys.stderr).emit(logging.makeLogRecord({"msg": text}))
            print(text, file=sys.stderr)  # noqa: T201
        assert not (UNSEEN - set("\r")) & set(stderr.getvalue())


def test_the_bars_of_libraries_still_move(screens: Callable[[bool], tuple[Screen, Screen]]) -> None:
    _, stderr = screens(True)
    sys.stderr.write("\rmodel.safetensors:  50%|\n\x1b[A")
    assert stderr.getvalue() == "\rmodel.safetensors:  50%|\n\x1b[A"


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_sequence_in_pieces_is_no_different(text: str, screens: Callable[[bool], tuple[Screen, Screen]]) -> None:
    stdout, _ = screens(True)
    for character in f"before {text} after":
        Output().piece(character)
    assert not OBEYED & set(stdout.getvalue())
    assert stdout.getvalue() == terminal.content(f"before {text} after")


def test_what_languages_need_stays_in_what_a_model_writes() -> None:
    for text in ("Größe, 東京\n\tx", "می\u200cخواهم", "\u05d0\u200f!", "👩\u200d💻 ❤\ufe0f", "क्\u200dष"):
        assert terminal.content(text) == text
    assert terminal.content("a\r\nb") == "a\nb"


def test_markup_and_emoji_codes_are_text(screens: Callable[[bool], tuple[Screen, Screen]]) -> None:
    text = "[bold]x[/bold] [/] [link=http://evil]y[/link] :smile: [@click=f]z"
    for method in SAID:
        if method not in ("document", "progress"):
            stdout, stderr = screens(False)
            SAID[method](Output(), text)
            assert text in stdout.getvalue() + stderr.getvalue(), method


def test_a_name_cannot_pretend_to_be_a_line_of_ours(screens: Callable[[bool], tuple[Screen, Screen]]) -> None:
    _, stderr = screens(False)
    Output().error(GemmaAwqError("No model x\nhint: rm -rf ~", "Check it."))
    assert stderr.getvalue() == "error: No model x\n  hint: rm -rf ~\nhint: Check it.\n"
    Output().table("", (("a\nb", "1"),))
    assert r"a\nb" in stderr.getvalue()


def test_a_message_has_bounds(screens: Callable[[bool], tuple[Screen, Screen]]) -> None:
    _, stderr = screens(False)
    Output().error(GemmaAwqError("x" * 10**7))
    assert len(stderr.getvalue()) < 5000
    assert "characters ...]" in stderr.getvalue()


def test_json_is_the_same_value_and_safe(screens: Callable[[bool], tuple[Screen, Screen]]) -> None:
    stdout, _ = screens(True)
    value = {"names": list(HOSTILE.values()), "text": "Größe 東京"}
    Output().document(value)
    assert json.loads(stdout.getvalue()) == value
    assert "Größe 東京" in stdout.getvalue()
    assert not OBEYED & set(stdout.getvalue())


@pytest.mark.parametrize("text", [text for text in HOSTILE.values() if "\0" not in text])
@pytest.mark.parametrize("place", [["{}"], ["run", "--{}"], ["run", "x", "{}"], ["run", "--top-k", "{}"]])
def test_a_wrong_command_line_is_quoted_safely(place: list[str], text: str, capsys: Capture) -> None:
    assert main([part.format(text) for part in place]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Usage: gemma-awq" in captured.err
    assert not UNSEEN & set(captured.err)


def test_names_and_errors_of_a_hostile_model(tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "evil\x1b]0;owned\x07\u202e[red]"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "\\u001b[2Jx[/]"}')
    for command in (["run", "hi", "-m"], ["bench"], ["quantize"]):
        assert main([*command, str(folder)]) == 1
        captured = capsys.readouterr()
        assert "error: " in captured.err
        assert not UNSEEN & set(captured.err)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals are POSIX")
def test_what_a_model_writes(artifacts: Callable[[str], Path]) -> None:
    """A random model's bytes hold control characters: a terminal gets none, a pipe gets each."""
    command = [
        sys.executable, "-m", "gemma_awq_cli", "run", "Hello", "-m", str(artifacts("gemma2")), "--device", "cpu",
        "--max-new-tokens", "180", "--temperature", "9", "--seed", "4", "--quiet",
    ]  # fmt: skip
    text = json.loads(subprocess.run([*command, "--json"], capture_output=True, check=True).stdout)["text"]
    assert OBEYED & set(text)
    assert subprocess.run(command, capture_output=True, check=True).stdout == f"{text}\n".encode()
    shown = in_terminal(command, 80, "xterm")
    assert not OBEYED & set(shown)
    assert shown.rstrip("\n") == terminal.content(text).rstrip("\n")


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals are POSIX")
@pytest.mark.parametrize("term", ["xterm-256color", "dumb", None])
@pytest.mark.parametrize("columns", [0, 20, 80])
def test_a_narrow_terminal(columns: int, term: str | None) -> None:
    """Tables and progress in a real pseudo-terminal: every figure stays whole and can be read."""
    code = (
        "import time\n"
        "from gemma_awq_cli.cli.console import Output\n"
        "from gemma_awq_cli.cli.streams import standard_streams\n"
        "with standard_streams():\n"
        "    out = Output()\n"
        "    with out.progress('Quantizing', 5) as bar:\n"
        "        bar.step(); out.note('layer 1/5  error 99.9% below round-to-nearest'); time.sleep(0.3)\n"
        "    rows = (('perplexity of the original', '67671746.52', '59154441.12'), ('time', '', '1.3 s'))\n"
        "    out.table('Fidelity on 234 tokens', rows, ('', '16-bit', '4-bit'))\n"
        "    out.result_table('', rows, ('', 'first-model-AWQ', 'second-model-AWQ'))\n"
    )
    shown = in_terminal([sys.executable, "-c", code], columns, term)
    assert "Traceback" not in shown
    for text in ("67671746.52", "59154441.12", "1.3 s", "layer 1/5"):
        assert text in shown
    assert "first-model-AWQ" in shown
    assert ("16-bit: 67671746.52" in shown) == (columns == 20)


def in_terminal(command: list[str], columns: int, term: str | None, **environment: str) -> str:
    """What a command shows in a pseudo-terminal of so many columns."""
    import fcntl
    import pty
    import struct
    import termios

    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    ours = {k: v for k, v in os.environ.items() if k not in ("TERM", "COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")}
    process = subprocess.Popen(
        command,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**ours, **({"TERM": term} if term else {}), **environment},
    )
    os.close(slave)
    shown = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # Linux: the other end is closed
            break
        if not part:
            break
        shown += part
    assert process.wait(60) == 0, shown.decode(errors="replace")
    os.close(master)
    return shown.decode(errors="replace").replace("\r\n", "\n")
