"""Two processes at one folder: whoever changes anything holds the lock, and whoever only looks changes nothing."""

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.staging import REPORT, StagedFolder
from gemma_awq_cli.system.locking import Lock

# Takes the folder again and again, replaces it, and makes sure each time that nobody else has it meanwhile.
CONTENDER = """
import os, random, sys, time
from pathlib import Path
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.staging import REPORT, StagedFolder
target, owner, until = Path(sys.argv[1]), sys.argv[2], time.monotonic() + float(sys.argv[3])
taken = 0
while time.monotonic() < until:
    try:
        with StagedFolder(target, force=True) as staged:
            os.close(os.open(owner, os.O_CREAT | os.O_EXCL))
            (staged.folder / REPORT).write_text(str(os.getpid()))
            time.sleep(random.random() / 500)
            os.unlink(owner)
            if random.random() < 0.3:
                raise ZeroDivisionError
        taken += 1
    except ZeroDivisionError:
        pass
    except GemmaAwqError as error:
        assert "Another process" in error.message, error.message
print(taken)
"""


def tree(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every name below a folder with its inode, its time of change, and what is in it."""
    found = {}
    for path in sorted(folder.rglob("*")):
        info = path.lstat()
        content = path.read_bytes() if path.is_file() else b""
        found[str(path)] = (info.st_ino, info.st_mtime_ns, content)
    return found


def artifact(folder: Path, said: str) -> None:
    folder.mkdir()
    (folder / REPORT).write_text(said)


@pytest.mark.slow
def test_no_two_processes_ever_have_it_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CONTENDER, str(tmp_path / "out"), str(tmp_path / "owner"), "3"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(4)]
    taken = 0
    for process in processes:
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == 0, stderr.decode()
        taken += int(stdout)
    assert taken > 10
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("force", [False, True])
def test_to_look_changes_nothing(force: bool, resume: bool, tmp_path: Path) -> None:
    from gemma_awq_cli.quantize.work_folder import WorkFolder

    target = tmp_path / "out"
    with StagedFolder(target, force=True) as staged:
        (staged.state / "journal.jsonl").write_bytes(b'{"seed": 0}\n{"groups": [], "seconds": 1}\n{"grou')
        (staged.folder / "model.safetensors").write_bytes(b"x")
        artifact(tmp_path / ".out.replaced", "old")  # between the two renames of a replacement
        before = tree(tmp_path)
        with suppress(GemmaAwqError):  # some may not begin here
            WorkFolder(target, force, resume)
        assert tree(tmp_path) == before
        staged.abandon()


def test_a_second_one_beside_it_takes_nothing_away(tmp_path: Path) -> None:
    target = tmp_path / "out"
    artifact(target, "old")
    with StagedFolder(target, force=True) as staged:
        (staged.folder / REPORT).write_text("new")
        before = tree(tmp_path)
        for force, resume in ((True, False), (False, True), (True, True)):
            with pytest.raises(GemmaAwqError, match="Another process is writing"):
                StagedFolder(target, force, resume).__enter__()
        assert tree(tmp_path) == before
    assert (target / REPORT).read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_killed_between_the_two_renames(tmp_path: Path) -> None:
    target = tmp_path / "out"
    artifact(tmp_path / ".out.replaced", "old")
    with pytest.raises(GemmaAwqError, match="exists and is not empty"):
        StagedFolder(target)
    with StagedFolder(target, resume=True) as staged:
        assert (target / REPORT).read_text() == "old"
        staged.abandon()
    assert (target / REPORT).read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_the_old_one_comes_back_when_the_new_one_cannot_be_put_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    artifact(target, "old")
    real = Path.rename

    def refuse(path: Path, to: Path) -> Path:
        if path.name == "model":
            raise OSError(5, "Input/output error")
        return real(path, to)

    def replace() -> None:
        with StagedFolder(target, force=True) as staged:
            (staged.folder / REPORT).write_text("new")
            monkeypatch.setattr(Path, "rename", refuse)

    with pytest.raises(GemmaAwqError, match="Input/output error"):
        replace()
    assert (target / REPORT).read_text() == "old"


def test_a_lock_of_a_removed_file_is_no_lock(tmp_path: Path) -> None:
    first, second = Lock(tmp_path / "lock"), Lock(tmp_path / "lock")
    assert first.acquire()
    assert second.is_held()
    assert not second.acquire()
    first.release(remove=True)
    assert not (tmp_path / "lock").exists()
    assert second.acquire()
    third = Lock(tmp_path / "lock")
    assert not third.acquire()
    second.release()
    assert not third.is_held()


@pytest.mark.skipif(os.name != "posix", reason="POSIX paths")
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("x" * 300, "too long"),
        ("x" * 250, "too long"),  # the folder that it is built in has a longer name
        ("nul\0", "NUL"),
        (".", "does not name a new folder"),
        ("..", "does not name a new folder"),
        ("/", "does not name a new folder"),
        ("/proc", "is a mount point"),
        ("file/below", "Not a directory"),
        ("file/below/far", "Not a directory"),
        ("file", "is not a folder"),
        ("/dev/null", "is not a folder"),
        ("pipe", "is not a folder"),
        ("dangling", "leads nowhere"),
        ("loop/x", "Too many levels of symbolic links"),
    ],
)
def test_impossible_places(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = tree(tmp_path)
    target = Path(name) if name in (".", "..") else tmp_path / name
    with pytest.raises(GemmaAwqError, match=said) as caught:
        StagedFolder(target, force=True)
    assert caught.value.hint
    assert tree(tmp_path) == before


def test_a_link_to_a_folder_is_replaced_and_its_folder_stays(tmp_path: Path) -> None:
    artifact(tmp_path / "elsewhere", "old")
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    with StagedFolder(tmp_path / "out", force=True) as staged:
        (staged.folder / REPORT).write_text("new")
    assert (tmp_path / "out" / REPORT).read_text() == "new"
    assert (tmp_path / "elsewhere" / REPORT).read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "out"]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
def test_a_resume_beside_a_running_force(
    tmp_path: Path, checkpoints: Callable[[str], Path], text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The issue's case with real processes: the artifact is there, one replaces it, another one finds it complete."""
    from gemma_awq_cli.cli.app import main
    from tests.conftest import quantize_arguments

    out = tmp_path / "out"
    arguments = quantize_arguments(checkpoints("gemma"), out, text_file)
    assert main(arguments) == 0
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from gemma_awq_cli.cli.app import main\n"
        "from tests.layers import as_layer_begins\n"
        "def wait():\n"
        "    print('waiting', flush=True)\n"
        "    end = time.monotonic() + 200\n"
        "    while not Path(sys.argv[1]).exists() and time.monotonic() < end: time.sleep(0.01)\n"
        "with as_layer_begins(2, wait):\n"
        "    sys.exit(main(sys.argv[2:]))\n"
    )
    go_on = tmp_path / "go-on"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(go_on), *arguments, "--force"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"waiting\n"
        before = tree(tmp_path / ".out.partial")
        assert len(before) > 5
        capsys.readouterr()
        for more in (["--resume"], ["--force"], ["--resume", "--force"]):
            assert main([*arguments, *more]) == 1
            assert "Another process is writing" in capsys.readouterr().err
            assert tree(tmp_path / ".out.partial") == before
        go_on.touch()
        assert running.wait(120) == 0, running.stderr and running.stderr.read()
    assert main([*arguments, "--resume"]) == 0
    assert "complete already" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["go-on", "out"]
