"""Standard streams as they come: another encoding, an end that is closed, a disk that is full, a reader that leaves."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import samples

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="shells and /dev are POSIX")]

# Every way to write a result, as a command does it.
RESULTS = """
import sys
from gemma_awq_cli.cli.app import app, main
from gemma_awq_cli.cli.console import Output
text = 'Gr\\u00f6\\u00dfe \\u6771\\u4eac \\U0001f600'
@app.command()
def write(ways: list[str]) -> None:
    out = Output()
    out.note(text)
    for way in ways:
        if way == 'result': out.result(text)
        if way == 'piece': [out.piece(letter) for letter in text]
        if way == 'document': out.document({'text': text, 'name': 'x\\udcff'})
        if way == 'table': out.result_table(text, ((text, '1'),), ('', text))
        if way == 'name': out.result('/tmp/x\\udcff')
sys.exit(main(['write', *sys.argv[1:]]))
"""
WAYS = ["result", "piece", "document", "table"]


def run(
    *arguments: str, code: str | None = None, redirect: str = "", **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """A command in a real shell, with redirections."""
    start = ["-c", code] if code else ["-m", "gemma_awq_cli"]
    env = {**os.environ, **environment}
    env.pop("PYTHONUNBUFFERED", None)
    return subprocess.run(
        ["bash", "-c", f'exec "$@" {redirect}', "bash", sys.executable, *start, *arguments],
        capture_output=True, timeout=120, env=env, check=False,
    )  # fmt: skip


NOT_UTF8 = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
ENCODINGS = {
    "cp1252": {"PYTHONIOENCODING": "cp1252"},
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "latin-1:strict": {"PYTHONIOENCODING": "latin-1:strict"},
    "C": {"LC_ALL": "C", **NOT_UTF8},
    "POSIX": {"LC_ALL": "POSIX", **NOT_UTF8},
    "UTF-8": {"PYTHONUTF8": "1"},
}


@pytest.mark.parametrize("encoding", samples.of(ENCODINGS, ["cp1252", "C", "UTF-8"]))
def test_a_text_that_the_encoding_lacks(encoding: str) -> None:
    environment = ENCODINGS[encoding]
    for way in WAYS:
        done = run(way, code=RESULTS, **environment)
        assert done.returncode == 0, done.stderr
        assert b"Traceback" not in done.stderr
        assert b"Gr" in done.stderr
        if way == "document":
            name = environment.get("PYTHONIOENCODING", "utf-8").partition(":")[0]
            assert json.loads(done.stdout.decode(name)) == {"text": "Größe 東京 😀", "name": "x\udcff"}
        elif "PYTHONUTF8" in environment and environment["PYTHONUTF8"] == "1":
            assert "Größe 東京 😀" in done.stdout.decode()
        else:
            assert rb"\u6771\u4eac \U0001f600" in done.stdout


def test_help_in_ascii() -> None:
    for command in ([], ["run"], ["quantize"], ["bench"], ["push"]):
        assert run(*command, "--help", PYTHONIOENCODING="ascii").returncode == 0


def test_a_name_that_is_no_utf_8_is_the_very_name_in_a_pipe() -> None:
    assert run("name", code=RESULTS, PYTHONUTF8="1").stdout == b"/tmp/x\xff\n"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("redirect", "code", "said"),
    [
        (">/dev/full", 1, b"Standard output cannot be written: No space left on device."),
        (">&-", 1, b"Standard output cannot be written: Bad file descriptor."),
        ("2>&-", 0, b""),
        ("2>/dev/full", 0, b""),
        ("<&-", 0, b"Gr"),
        (">/dev/full 2>&1", 1, b""),
        (">&- 2>&-", 1, b""),
        ("<&- 2>&-", 0, b""),
        ("<&- >&- 2>&-", 1, b""),
    ],
)
def test_ends_that_are_closed_or_full(way: str, redirect: str, code: int, said: bytes) -> None:
    done = run(way, code=RESULTS, redirect=redirect, PYTHONUTF8="1")
    assert done.returncode == code
    assert said in done.stderr
    for word in (b"Traceback", b"Exception ignored", b"Errno"):
        assert word not in done.stdout + done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "--help"], ["bench", "-h"], [*WAYS]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("together", [False, True])
def test_a_reader_that_left(arguments: list[str], unbuffered: str, together: bool) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    start = ["-c", RESULTS] if arguments[0] in WAYS else ["-m", "gemma_awq_cli"]
    done = subprocess.run(
        [sys.executable, *start, *arguments], stdout=writing, stderr=writing if together else subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered}, check=False,
    )  # fmt: skip
    os.close(writing)
    assert done.returncode == 141
    if not together:
        assert b"Gr" in done.stderr or done.stderr == b""
        assert b"Error" not in done.stderr


@pytest.mark.usefixtures("warm_python")
def test_work_goes_on_when_nobody_listens_to_the_notes(
    tmp_path: Path, checkpoints: Callable[[str], Path], text_file: Path
) -> None:
    from tests.conftest import quantize_arguments

    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "gemma_awq_cli", *quantize_arguments(checkpoints("gemma"), tmp_path / "out", text_file)],
        stdout=subprocess.PIPE, stderr=writing, check=False,
    )  # fmt: skip
    os.close(writing)
    assert done.returncode == 0
    assert done.stdout.decode() == f"{tmp_path / 'out'}\n"


@pytest.mark.parametrize(
    ("redirect", "code", "said"),
    [
        ("| head -c 1", 141, b""),
        (">/dev/full", 1, b"cannot be written"),
        (">&-", 1, b"cannot be written"),
        ("2>&-", 0, b""),
        ("--json | head -c 1", 141, b""),
    ],
)
def test_a_streamed_answer_whose_end_is_gone(
    redirect: str, code: int, said: bytes, artifacts: Callable[[str], Path]
) -> None:
    folder = artifacts("gemma")
    script = (
        f"set -o pipefail; {sys.executable} -m gemma_awq_cli run Hello -m {folder} --device cpu --max-new-tokens 200 "
        f"{redirect}"
    )
    if "head" in redirect:  # the reader is gone before the first piece
        script = script.replace("head -c 1", "true")
    done = subprocess.run(["bash", "-c", script], capture_output=True, timeout=120, check=False)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr


def test_a_closed_standard_input_is_no_prompt() -> None:
    done = run("run", redirect="<&-")
    assert done.returncode == 2
    assert b"The prompt is empty." in done.stderr
    done = run("run", redirect="0>/dev/null")
    assert done.returncode == 1
    assert b"Standard input cannot be read: " in done.stderr
