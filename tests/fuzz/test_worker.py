"""The worker tells what a command did, however it ended, and goes on with the next case."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.fuzz.cases import Case, Result
from tests.fuzz.harness import PROJECT, judge
from tests.fuzz.steps import STEPS, apply

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from tests.fuzz import worker

def loop():
    while True: pass

def orphan():
    if os.fork() == 0: time.sleep(60)
    return 0

DEEDS = {
    "fine": lambda: print("said") or 0,
    "refuse": lambda: print("error: no\\nhint: yes", file=sys.stderr) or 1,
    "raise": lambda: 1 / 0,
    "crash": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "leave": lambda: os._exit(9),
    "loop": loop,
    "wait": lambda: time.sleep(60),
    "grow": lambda: len(bytearray(os.urandom(1 << 20)) * 80) and 0,
    "read": lambda: print(sys.stdin.read(), sys.stdin.isatty()) or 0,
    "leak": lambda: print(Path("outside/secret.txt").read_text()) or 0,
    "leave output": lambda: os.mkdir("out") or print("error: x\\nhint: y", file=sys.stderr) or 1,
    "page": lambda: Path("page.html").write_text("<script>alert(1)</script>") and 0,
    "orphan": orphan,
}
worker._command = lambda case: DEEDS[case.arguments[0]]()
worker._prepare = lambda root: None
worker.CPU_SECONDS, worker.WALL_SECONDS = 0, 4.0
worker.serve(Path(sys.argv[1]), None)
"""


def run(root: Path, *cases: Case) -> list[Result]:
    """The results of cases that the script above carries out instead of the command."""
    (root / "base" / "outside").mkdir(parents=True)
    (root / "base" / "outside" / "secret.txt").write_text("canary-7f3a-of-the-file-outside")
    asked = json.dumps({"cases": [asdict(case) for case in cases]}) + "\n"
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(root)], input=asked, capture_output=True, text=True, cwd=PROJECT,
        env=environment, timeout=120, check=True,
    )  # fmt: skip
    ready, *lines, end = done.stdout.splitlines()
    assert ready == '{"ready": true}'
    assert end == ""
    return [Result(**json.loads(line)) for line in lines]


def deed(name: str, stdin: str = "", terminal: bool = False) -> Case:
    return Case("x", 1, "base", [], [name], stdin, terminal)


def test_however_a_command_ends_it_is_seen_and_the_next_one_runs(tmp_path: Path) -> None:
    expected = {
        "fine": [], "refuse": [], "raise": ["traceback"], "crash": ["died of SIGSEGV"], "leave": ["died of exit 9"],
        "loop": ["died of 0 s of processor time"], "wait": ["died of a hang"], "orphan": [],
        "leak": ["what lies outside the model was printed"], "page": ["a script of the model's is in the page"],
        "leave output": ["a failed command left its output folder"],
    }  # fmt: skip
    names = [name for one in expected for name in (one, "fine")]
    results = run(tmp_path, *map(deed, names))
    for name, result in zip(names, results, strict=True):
        assert [finding.what for finding in judge(deed(name), result)] == expected[name], name
        assert name != "fine" or result.stdout == "said\n"


def test_memory_and_standard_input_are_each_cases_own(tmp_path: Path) -> None:
    grown, fine, read, typed = run(tmp_path, deed("grow"), deed("fine"), deed("read", "abc"), deed("read", "abc", True))
    assert grown.grown > 75_000_000
    assert fine.grown < 20_000_000
    assert read.stdout == "abc False\n"
    assert typed.stdout == "abc True\n"


def test_damage_to_what_is_not_there_does_nothing(tmp_path: Path) -> None:
    arguments = {
        "set": [["a"], 1], "delete": [["a"]], "rename": [["a"], "b"], "double": [["a"]], "truncate": [3],
        "flip": [1, 1], "splice": [0, 1, "x"], "replace": ["a", "b"], "prepend": ["x"], "append": ["x"],
        "recode": ["utf-16"], "header": [["a"], 1], "header_length": [3], "tensor": ["a", "F32", [1], "00"],
        "drop_tensor": ["a"], "remove": [], "copy": ["y"], "move": ["y"], "mode": [0], "sparse": [9],
    }  # fmt: skip
    assert set(STEPS) - set(arguments) == {"directory", "link", "listener", "pipe", "write"}  # these make something
    for name, own in arguments.items():
        apply(tmp_path, [[name, "x.json", *own]])
        assert list(tmp_path.iterdir()) == [], name
