"""Signals at bad moments: during imports, during clean-up, twice, three times; never a traceback, never a half."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from gemma_awq_cli.errors import Terminated
from gemma_awq_cli.system import interruption
from tests import samples

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
ERRORS = ["ValueError('shape')", "GemmaAwqError('unreadable', 'hint')", "OSError(5, 'x')"]  # of a library

# A command in the place of all others: says where it is, and is slow where it is told to be.
SLOW = """
import sys, time
from pathlib import Path
from gemma_awq_cli.cli import app
from gemma_awq_cli.models.checkpoints import staging
from gemma_awq_cli.models.checkpoints.staging import StagedFolder
from gemma_awq_cli.cli.console import Output
from gemma_awq_cli.cli.options import Command

def slowly(where, real):
    def do(*given, **more):
        if where == at and begun:
            print(where, flush=True)
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                time.sleep(0.01)
        return real(*given, **more)
    return do

at, target, seconds = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
begun = False  # what is cleared away before is not slow
staging._remove = slowly("removing", staging._remove)
StagedFolder._publish = slowly("publishing", StagedFolder._publish)
Output.note = slowly("saying", Output.note)

@app.app.command("slow", cls=Command)
def command() -> None:
    global begun
    with StagedFolder(target) as staged:
        begun = True
        (staged.folder / "weights").write_bytes(b"x" * 1000)
        if at != "publishing":
            print("working", flush=True)
            while True:
                time.sleep(0.01)

sys.argv = ["gemma-awq", "slow"]
app.entry()
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Starts SLOW, and waits for a word of it."""
    running: list[subprocess.Popen[str]] = []

    def begin(at: str, seconds: float = 1, code: str = SLOW) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-c", code, at, str(tmp_path / "out"), str(seconds)], stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        running.append(process)
        return process

    yield begin
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate()


def heard(process: "subprocess.Popen[str]", word: str) -> None:
    assert process.stdout is not None
    while line := process.stdout.readline():
        if line.strip() == word:
            return
    raise AssertionError(f"{word} never came: {process.communicate()[1]}")


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_the_first_unwinds(
    number: signal.Signals, start: Callable[..., "subprocess.Popen[str]"], tmp_path: Path
) -> None:
    process = start("nowhere")
    heard(process, "working")
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert stderr == ("interrupted\n" if number == signal.SIGINT else "terminated\n")
    assert list(tmp_path.iterdir()) == []


def pairs() -> Iterator[ParameterSet]:
    """Where the command is, its first signal and its second; every run tries one pair in each place."""
    some = ("removing", 1, 0), ("saying", 0, 2)
    for at in ("removing", "saying"):
        for first, second in product(range(len(SIGNALS)), repeat=2):
            marks = () if (at, first, second) in some else pytest.mark.thorough
            one, other = SIGNALS[first], SIGNALS[second]
            yield pytest.param(at, one, other, marks=marks, id=f"{at}-{one.name}-{other.name}")


@pytest.mark.slow
@pytest.mark.parametrize(("at", "first", "second"), list(pairs()))
def test_a_second_one_waits_for_the_clean_up(
    at: str,
    first: signal.Signals,
    second: signal.Signals,
    start: Callable[..., "subprocess.Popen[str]"],
    tmp_path: Path,
) -> None:
    process = start(at)
    heard(process, "working")
    process.send_signal(first)
    heard(process, at)
    process.send_signal(second)
    _, stderr = process.communicate(timeout=60)
    assert "Traceback" not in stderr
    assert process.returncode in (128 + first, 128 + second)
    assert list(tmp_path.iterdir()) == []


def test_a_third_one_ends_the_process_at_once(start: Callable[..., "subprocess.Popen[str]"]) -> None:
    process = start("removing", 60)
    heard(process, "working")
    process.send_signal(signal.SIGINT)
    heard(process, "removing")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=30)
    assert time.monotonic() - begun < 10
    assert process.returncode == 128 + signal.SIGTERM
    assert stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_an_artifact_is_put_in_its_place_before_the_process_ends(
    number: signal.Signals, start: Callable[..., "subprocess.Popen[str]"], tmp_path: Path
) -> None:
    process = start("publishing")
    heard(process, "publishing")
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "weights").read_bytes() == b"x" * 1000


@pytest.mark.parametrize("module", ["typer", "gemma_awq_cli.cli.console"])
def test_ctrl_c_while_the_command_is_imported(module: str) -> None:
    code = (
        "import builtins, os, signal, sys, time\n"
        "real = builtins.__import__\n"
        "def slow(name, *more):\n"
        f"    if name == {module!r} and not done:\n"
        "        done.append(1); os.kill(os.getpid(), signal.SIGINT); time.sleep(5)\n"
        "    return real(name, *more)\n"
        "done = []\n"
        "builtins.__import__ = slow\n"
        "from gemma_awq_cli.__main__ import entry\n"
        "entry()\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False)
    assert ended.returncode == 130
    assert b"Traceback" not in ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("seconds", samples.of([0.2, 0.6, 1.2, 2.0, 3.0, 4.5], [0.6, 2.0]))
def test_ctrl_c_at_any_moment_of_the_start(seconds: float, artifacts: Callable[[str], Path]) -> None:
    """While torch is imported, while the tokenizer is loaded by its thread, while the first token is made."""
    code = (
        "import os, signal, sys, threading, time\n"
        "from gemma_awq_cli.cli import app\n"
        "import gemma_awq_cli.system.interruption\n"
        f"threading.Timer({seconds}, lambda: os.kill(os.getpid(), signal.SIGINT)).start()\n"
        "sys.argv = sys.argv[1:]\n"
        "app.entry()\n"
    )
    arguments = ["gemma-awq", "run", "Hello", "-m", str(artifacts("gemma")), "--device", "cpu"]
    ended = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, timeout=120, check=False)
    assert ended.returncode in (0, 130)
    assert b"Traceback" not in ended.stderr
    assert b"Exception ignored" not in ended.stderr


def test_an_import_is_not_broken_off(tmp_path: Path) -> None:
    """Half a module cannot be imported again; the signal that came meanwhile is not lost either."""
    (tmp_path / "slow.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(0.3)\ndone = True\n"
    )
    script = (
        "import time\n"
        "from gemma_awq_cli.system import interruption\n"
        "with interruption.heeded():\n"
        "    try:\n"
        "        import slow\n"
        "        print(slow.done, flush=True)\n"
        "        time.sleep(30)\n"
        "    except KeyboardInterrupt:\n"
        "        print('unwound')\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=20, env=environment, check=False
    )
    assert ended.stdout.split() == ["True", "unwound"], ended.stderr


def test_one_that_an_object_swallows_while_it_dies_comes_again() -> None:
    script = (
        "import os, signal, time\n"
        "from gemma_awq_cli.system import interruption\n"
        "class Dying:\n"
        "    def __del__(self):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(0.01)\n"
        "with interruption.heeded():\n"
        "    try:\n"
        "        Dying()\n"
        "        time.sleep(30)\n"
        "    except interruption.Terminated as error:\n"
        "        print('unwound', error.number)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=20, check=False)
    assert ended.stdout.split() == ["unwound", str(int(signal.SIGTERM))], ended.stderr
    assert ended.stderr == ""


def test_what_is_ignored_from_the_start_stays_ignored(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from gemma_awq_cli.system import interruption\n"
        "with interruption.heeded():\n"
        "    os.kill(os.getpid(), signal.SIGHUP); os.kill(os.getpid(), signal.SIGINT)\n"
    )
    command = f"trap '' HUP INT; exec {sys.executable} -c \"$1\""
    assert subprocess.run(["bash", "-c", command, "bash", script], check=False).returncode == 0


def held(done: list[bool]) -> None:
    with interruption.finishing():
        os.kill(os.getpid(), signal.SIGINT)
        done.append(True)


def test_handlers_are_as_before_after_it() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with interruption.heeded():
        assert signal.getsignal(signal.SIGTERM) not in before
        with pytest.raises(Terminated):
            os.kill(os.getpid(), signal.SIGTERM)
        done: list[bool] = []
        with pytest.raises(KeyboardInterrupt):
            held(done)
        assert done
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_one_may_be_handed_to_an_event_loop() -> None:
    """What is taken is raised when the block ends; what is not taken, at once."""
    got: list[BaseException] = []

    def take(error: BaseException) -> bool:
        got.append(error)
        return True

    def inside(receive: Callable[[BaseException], bool]) -> None:
        with interruption.handed_to(receive):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0)
            reached.append(True)

    reached: list[bool] = []
    with interruption.heeded():
        with pytest.raises(Terminated) as raised:
            inside(take)
        assert got == [raised.value]
        assert reached
        with pytest.raises(Terminated):
            inside(lambda error: False)
        with pytest.raises(Terminated):
            os.kill(os.getpid(), signal.SIGTERM)
    assert len(got) == len(reached) == 1


@pytest.mark.parametrize(("error", "number"), samples.of(
    product(ERRORS, SIGNALS), list(zip(ERRORS, SIGNALS, strict=True))
), ids=str)  # fmt: skip
def test_one_whose_exception_a_library_replaces_is_that_signal(number: signal.Signals, error: str) -> None:
    """As torch does when safetensors makes a tensor: the signal's exception is lost, and another arrives."""
    script = (
        "import os, sys, time\n"
        "from gemma_awq_cli.cli import app\n"
        "from gemma_awq_cli.cli.options import Command\n"
        "from gemma_awq_cli.errors import GemmaAwqError, Terminated\n"
        "@app.app.command('replace', cls=Command)\n"
        "def command(late: float) -> None:\n"
        "    try:\n"
        f"        os.kill(os.getpid(), {int(number)})\n"
        "        time.sleep(30)\n"
        "    except (KeyboardInterrupt, Terminated):\n"
        "        time.sleep(late)\n"
        f"        raise {error} from None\n"
        "sys.argv[0] = 'gemma-awq'\n"
        "app.entry()\n"
    )

    def ended(late: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-c", script, "replace", late]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    at_once = ended("0")
    assert at_once.returncode == 128 + number
    assert at_once.stderr == ("interrupted\n" if number == signal.SIGINT else "terminated\n")
    assert ended("1.2").returncode == 1  # an error long after a signal that was dealt with is that error
