"""Files with a result: written whole or not at all, never to a device, and what was there stays until then."""

import errno
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma_awq_cli.cli.app import main
from gemma_awq_cli.cli.options import _require_filled
from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.system.failures import unforeseen_error
from gemma_awq_cli.system.saving import (
    appearing_whole,
    local_path,
    require_file_place,
    scratch_folder,
    write_errors,
    write_new,
    write_whole,
)

Capture = pytest.CaptureFixture[str]
posix = pytest.mark.skipif(os.name != "posix", reason="devices and links are POSIX's")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, b"first")
    path.chmod(0o640)
    write_whole(path, b"second")
    assert path.read_bytes() == b"second"
    assert path.stat().st_mode & 0o777 == 0o640
    with pytest.raises(FileExistsError):
        write_new(path, b"third")
    assert path.read_bytes() == b"second"
    write_new(tmp_path / "other", b"new")
    assert names(tmp_path) == ["file", "other"]


@posix
def test_a_link_keeps_leading_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"first")
    (tmp_path / "link").symlink_to("real")
    write_whole(tmp_path / "link", b"second")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"second"


def write_appearing(path: Path, content: bytes) -> None:
    with appearing_whole(path) as partial:
        partial.write_bytes(content)


@pytest.mark.parametrize("write", [write_whole, write_new, write_appearing])
@pytest.mark.parametrize("step", ["fsync", "replace", "link"])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_whatever_happens_nothing_half_is_left(
    write: Callable[[Path, bytes], None],
    step: str,
    error: BaseException,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "file"
    if write is not write_new:
        path.write_bytes(b"first")

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(os, "fsync" if step == "fsync" else step, fail)
    used = step == "fsync" or (step == "link") == (write is write_new)
    if step == "link" and isinstance(error, OSError):
        used = False  # a file system without hard links: it is renamed
    if used:
        with pytest.raises(type(error)):
            write(path, b"second")
        assert names(tmp_path) == ([] if write is write_new else ["file"])
        assert not path.exists() or path.read_bytes() == b"first"
    else:
        write(path, b"second")
        assert path.read_bytes() == b"second"
        assert names(tmp_path) == ["file"]


@posix
@pytest.mark.parametrize("name", ["x" * 250, "ö" * 120, "\udcff"])
def test_long_and_odd_names_can_be_written(name: str, tmp_path: Path) -> None:
    write_whole(tmp_path / name, b"x")
    assert (tmp_path / name).read_bytes() == b"x"


@posix
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("/dev/zero", "is a device"),
        ("/dev/null", "is a device"),
        ("/dev/full", "is a device"),
        ("/dev/stdin", "a regular file is needed|leads nowhere|cannot be written|own messages"),
        ("pipe", "is a pipe"),
        ("socket", "is a socket"),
        ("folder", "is a folder"),
        ("link", "is a pipe"),
        ("dangling", "leads nowhere"),
        ("absent/file", "does not exist"),
        ("file/below", "Not a directory"),
        ("x" * 300, "too long"),
        ("nul\0", "NUL"),
        ("loop", "Too many levels"),
    ],
)
def test_places_that_no_file_can_be_written_to(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's name must be short
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
    Path("folder").mkdir()
    Path("file").write_text("x")
    Path("link").symlink_to("pipe")
    Path("dangling").symlink_to("nowhere")
    Path("loop").symlink_to("loop")
    before = names(tmp_path)
    with pytest.raises(GemmaAwqError, match=said) as caught:
        require_file_place(Path(name), "give another --output")
    assert "give another --output" in caught.value.hint.lower()
    assert names(tmp_path) == before


@posix
@pytest.mark.parametrize("target", ["/dev/zero", "/dev/stdout", "pipe", "folder"])
def test_commands_refuse_them_before_anything_is_loaded(
    target: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("folder").mkdir()
    Path("prompts.txt").write_text("Hello\n")
    code = (
        "import sys\nfrom gemma_awq_cli.cli.app import main\ncode = main(sys.argv[1:])\nprint('torch' in sys.modules)\n"
    )
    batch = ["run", "-m", "absent", "--input", "prompts.txt", "--output", target]
    run = subprocess.run(
        [sys.executable, "-c", f"{code}sys.exit(code)", *batch],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert run.returncode == 1
    assert run.stdout == "False\n"
    assert re.search("a regular file is needed|own messages", run.stderr)
    for command in (["bench", "absent", "--report", target], ["quantize", "absent", "-o", target]):
        if command[0] == "bench" or target in ("/dev/zero", "pipe"):
            assert main(command) == 1
            said = capsys.readouterr().err
            assert re.search("a regular file is needed|not a folder|leads nowhere|own messages", said)
    assert names(tmp_path) == ["folder", "pipe", "prompts.txt"]


CODES = sorted({code for name, code in vars(errno).items() if name.startswith("E")})


@pytest.mark.parametrize("filename", [None, "some/file"])
def test_every_refusal_of_the_system_is_an_error_with_a_hint(filename: str | None) -> None:
    def refuse(code: int) -> None:
        with write_errors(Path("there"), "choose another place"):
            raise OSError(code, os.strerror(code), filename)

    for code in CODES:
        with pytest.raises(GemmaAwqError) as caught:
            refuse(code)
        assert "there" in caught.value.message or (filename and filename in caught.value.message)
        assert "choose another place" in caught.value.hint
        again = unforeseen_error(OSError(code, os.strerror(code), filename))
        assert os.strerror(code) in again.message
        assert again.hint


@pytest.mark.parametrize(
    "error",
    [
        *(OSError(code, os.strerror(code), "/some/file") for code in (errno.EIO, errno.EFBIG, errno.ESTALE)),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset"),
        TimeoutError("timed out"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_nobody_foresaw_is_no_traceback(
    error: Exception, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gemma_awq_cli.models.checkpoints import source

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(source, "find_source", fail)
    assert main(["run", "Hello", "-m", "x"]) == 1
    said = capsys.readouterr().err
    assert "error: " in said
    assert "hint: " in said


@pytest.mark.parametrize("error", [ValueError("ours"), AssertionError(), KeyError("x"), RuntimeError("x"), TypeError()])
def test_our_own_bugs_keep_their_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    from gemma_awq_cli.generate import finding

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(finding, "find_source", fail)
    with pytest.raises(type(error)):
        main(["run", "Hello", "-m", "x"])


@pytest.mark.slow
@posix
def test_a_limit_on_the_size_of_files(tmp_path: Path, checkpoints: Callable[[str], Path], text_file: Path) -> None:
    """A real EFBIG, after the weights' file was begun."""
    from tests.conftest import quantize_arguments

    arguments = quantize_arguments(checkpoints("gemma"), tmp_path / "out", text_file)
    script = f"ulimit -f 60; exec {sys.executable} -m gemma_awq_cli " + ' "$@"'
    done = subprocess.run(["bash", "-c", script, "bash", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert "ulimit -f" in done.stderr
    assert "Traceback" not in done.stderr
    assert names(tmp_path) == []


@posix
def test_home_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_path(Path("~/x"), "give another") == tmp_path / "x"
    with pytest.raises(GemmaAwqError, match="no such user"):
        local_path(Path("~nobody-of-this-name/x"), "give another")


def test_no_folder_for_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/dev/null/x"])
    with pytest.raises(GemmaAwqError, match="folder for temporary files") as caught, scratch_folder():
        pass
    assert "TMPDIR" in caught.value.hint


EMPTY = [
    ["run", "-m", "", "Hello"],
    ["run", "--model", "", "Hello"],
    ["run", "--model=", "Hello"],
    ["run", "Hello", "--revision", ""],
    ["run", ""],
    ["run", "--", ""],
    ["run", "--input", "", "--output", "x"],
    ["run", "--input", "x", "--output="],
    ["quantize", ""],
    ["quantize", "x", "-o", ""],
    ["quantize", "x", "--calibration", ""],
    ["quantize", "x", "--max-memory="],
    ["bench", ""],
    ["bench", "x", "--report", ""],
    ["bench", "x", "--reference", ""],
    ["push", "", "x"],
    ["push", "a/b", ""],
    ["push", "a/b", "x", "--revision", ""],
    ["run", "-m", "nul\0", "Hello"],
    ["quantize", "x", "-o", "nul\0"],
    ["run", "Hello", "--temperature", "nan"],
    ["run", "Hello", "--temperature", "inf"],
    ["bench", "x", "--tolerance", "nan"],
    ["bench", "x", "--max-kl", "inf"],
    ["run", "Hello", "--seed", "9" * 30],
    ["run", "Hello", "--seed", "9" * 6000],
    ["quantize", "x", "--seed", "-" + "9" * 30],
    ["run", "Hello", "--top-k", "9" * 30],
    ["bench", "x", "--threads", "1000000"],
    ["bench", "x", "--pp", "1000000000000"],
    ["bench", "x", "--batch", "1000000000"],
    ["quantize", "x", "--max-memory", "9" * 400],
    ["bench", "x", "--max-rss", "9" * 400 + "GB"],
]


@pytest.mark.parametrize("arguments", EMPTY, ids=lambda arguments: " ".join(arguments)[:40].replace("\0", "NUL"))
def test_empty_and_endless_values_are_wrong_usage(
    arguments: list[str], capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "rror: " in captured.err
    assert names(tmp_path) == []


def test_what_may_be_empty() -> None:
    for arguments in (["Hello", "--system", ""], ["Hello", "--stop="], ["x"], ["-", "--raw"]):
        _require_filled(arguments)
    with pytest.raises(UsageError):
        _require_filled(["--system", "", ""])


def test_an_empty_variable_is_no_model(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMMA_AWQ_MODEL", "")
    assert main(["run", "Hello"]) == 2
    assert "GEMMA_AWQ_MODEL is set but empty" in capsys.readouterr().err


def test_a_path_of_too_many_parts_is_an_error() -> None:
    with pytest.raises(GemmaAwqError, match="has 5000 parts"):
        local_path(Path("x/" * 5000), "choose another folder with -o")
