"""The launcher of tests/warm_python.py does what Python does."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PYTHON = sys.executable
SHOW = "import os, sys; print(sys.argv[1:], os.getcwd(), os.environ.get('OWN'), __name__); print('e', file=sys.stderr)"
# Three threads of each of a hundred children begin at once. Without `renew_threads`, one in forty children fails.
RACE = """
import os, sys, threading, torch, warm_server
ones = torch.ones(40000)
sys.setswitchinterval(1e-6)
for _ in range(100):
    child = os.fork()
    if child == 0:
        warm_server.renew_threads()
        begun = []
        def work():
            begun.append(1)
            while len(begun) < 3:
                pass
            torch.add(ones, ones)
        threads = [threading.Thread(target=work) for _ in range(3)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        os._exit(0)
    os.waitpid(child, 0)
"""
pytestmark = [
    pytest.mark.usefixtures("warm_python"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it is the real Python elsewhere"),
]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (SHOW, 0), (SHOW + "; sys.exit(3)", 3), ("import sys; sys.exit('why')", 1), ("1 / 0", 1),
        ("import sys; print(sys.stdin.read())", 0), ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -15),
        ("import atexit; atexit.register(print, 'end')", 0),
        ("import threading, time; threading.Thread(target=lambda: (time.sleep(.2), print('late'))).start()", 0),
        ("import sys; print([path for path in sys.path if not path.endswith('.zip')][1:3])", 0),
        ("import huggingface_hub.constants as constants; print(constants.HF_HOME)", 0),
    ],
)  # fmt: skip
def test_it_does_what_python_does(text: str, code: int, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(text)
    environment = {**os.environ, "OWN": "é", "HF_HOME": str(tmp_path), "PYTHONPATH": str(tmp_path)}
    for arguments in (["-c", text, "a", "b c"], [str(script), "a"], ["-m", "script", "-x"]):
        python, warm = (
            subprocess.run([one, *arguments], input="in", capture_output=True, text=True, cwd=tmp_path, env=environment)
            for one in (PYTHON, sys.executable)
        )
        assert (warm.returncode, warm.stdout) == (python.returncode, python.stdout), warm.stderr
        assert warm.stderr.splitlines()[-1:] == python.stderr.splitlines()[-1:]
        assert python.returncode == code


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_it_ends_with_its_launcher(sent: signal.Signals) -> None:
    code = "import os, sys, time; assert 'torch' in sys.modules; print(os.getpid(), flush=True); time.sleep(60)"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        assert int(launcher.stdout.readline()) != launcher.pid
        launcher.send_signal(sent)
        assert launcher.wait(30) == -sent
        assert launcher.stdout.read() == ""  # its last writer has ended


@pytest.mark.parametrize(
    ("options", "variables"), [(["-S"], {}), ([], {"OMP_NUM_THREADS": "2"}), ([], {"PYTHONUTF8": "1"})]
)
def test_another_start_is_one_of_the_real_python(options: list[str], variables: dict[str, str]) -> None:
    command = [sys.executable, *options, "-c", "import sys; print('torch' in sys.modules)"]
    assert subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True).stdout == "False\n"


def test_threads_find_the_pool_that_the_fork_broke_renewed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(RACE)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    warm = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment)
    assert (warm.stdout, warm.stderr) == ("", "")
