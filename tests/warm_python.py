"""A Python that has imported torch already: for tests that start many processes, and do not test how one starts.

`warm_python` puts a launcher in the place of `sys.executable`. It hands its arguments, environment, folder and files to
tests/warm_server.py, which forks: the child does what Python would do with `-m MODULE`, `-c CODE` or a script.
Importing torch, and what transformers imports beside it, takes seconds of each process otherwise.

The launcher ends as the child does, and passes signals on; if it is killed, so is the child. Where an option of Python
is given, or a variable that Python or torch read when they start is another, it becomes the real Python. The child has
no terminal: a test of one needs the real Python.
"""

import os
import shlex
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

SERVER = Path(__file__).with_name("warm_server.py")
READ_AT_START = (
    "ASAN_", "CUDA_", "GOMP_", "KMP_", "LANG", "LC_", "LD_", "MKL_", "OMP_", "OPENBLAS_", "PYTHON", "PYTORCH_",
    "TORCH", "TRITON_",
)  # fmt: skip
HEEDED = ("PYTHONPATH", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE")  # by the server, for each child
LAUNCHER = """
import array, json, os, signal, socket, sys
arguments, environment = sys.argv[1:], dict(os.environ)
start = {{name: value for name, value in environment.items() if name.startswith({read!r}) and name not in {heeded!r}}}
if start != {start!r} or not arguments or arguments[0].startswith("-") and arguments[0] not in ("-m", "-c"):
    os.execv({python!r}, [{python!r}, *arguments])
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
order = json.dumps([arguments, environment, os.getcwd()]).encode()
files = array.array("i", [0, 1, 2])
server.sendmsg([len(order).to_bytes(8, "little")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
server.sendall(order)
answers = server.makefile()
child = int(answers.readline())
for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(name, lambda number, _: os.kill(child, number))
server.sendall(b"g")  # now the child may begin
code = int(answers.readline() or -signal.SIGKILL)
if code < 0:
    if -code not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


def read_at_start() -> dict[str, str]:
    """The variables that Python and torch read when they start."""
    return {name: value for name, value in os.environ.items() if name.startswith(READ_AT_START) and name not in HEEDED}


@pytest.fixture(scope="session")
def warm_start() -> dict[str, str]:
    """The variables that a process must start with to be warm. A library that a test imports may set others later."""
    return read_at_start()


@pytest.fixture(scope="session")
def warm_launcher(warm_start: dict[str, str]) -> Iterator[Path]:
    """The launcher's path. Its server ends with the tests."""
    with tempfile.TemporaryDirectory(prefix="warm", ignore_cleanup_errors=True) as folder:  # a socket's path is short
        address, script, launcher = (Path(folder, name) for name in ("socket", "launcher.py", "python"))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        server = subprocess.Popen(
            [sys.executable, "-I", str(SERVER), str(address)], env=environment, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        assert server.stdin is not None
        assert server.stdout is not None
        with server.stdin, server.stdout:
            assert server.stdout.readline() == b"ready\n"
            text = LAUNCHER.format(
                python=sys.executable, address=str(address), start=warm_start, read=READ_AT_START, heeded=HEEDED
            )
            script.write_text(text)
            launcher.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -IS {shlex.quote(str(script))} "$@"\n')
            launcher.chmod(launcher.stat().st_mode | stat.S_IXUSR)
            yield launcher
        server.wait(60)


@pytest.fixture
def warm_python(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that a test starts with `sys.executable` have torch from the start, where the system can fork."""
    if os.name == "posix" and sys.platform != "darwin":  # whose libraries do not bear it
        monkeypatch.setattr(sys, "executable", str(request.getfixturevalue("warm_launcher")))
        warm_start = request.getfixturevalue("warm_start")
        for name in read_at_start().keys() - warm_start.keys():
            monkeypatch.delenv(name)
        for name, value in warm_start.items():
            monkeypatch.setenv(name, value)
