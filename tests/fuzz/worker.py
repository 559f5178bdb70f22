"""The process that runs cases. It imports everything once and forks; a fork runs many cases, one after another.

Reads JSON lines on standard input: `{"cases": [...]}`; writes a line for each case as soon as it has ended, and an
empty one at the end. A fork that dies, hangs or grows too large is reported with the case that it was at, and another
fork goes on with the next one.
"""

import contextlib
import faulthandler
import gc
import json
import os
import resource
import select
import shutil
import signal
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.fuzz.cases import Case, Result
from tests.fuzz.hostile import CANARY, to_bytes
from tests.fuzz.steps import apply

CPU_SECONDS = 10
WALL_SECONDS = 30.0  # a machine may be busy with other things
GROWTH = 1_000_000_000  # bytes of resident memory
ADDRESSES = 6_000_000_000  # bytes of address space beyond what is there: enough to see a growth that is too large
COMPARED = ("config", "weights", "packed", "index", "files")  # whose answers are compared with transformers'
HARNESS_FAILED = 70
TEXT_LIMIT = 20_000  # characters of output that are passed on


def serve(root: Path, sanitized: Path | None) -> None:
    """Make the bases below `root`, then run what standard input asks for. sanitized: a library to run models with."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the command prints while the bases are made is no answer
    if sanitized is not None:
        from tests.fuzz.sanitizers import use

        use(sanitized)
    _prepare(root)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        cases = [Case(**fields) for fields in json.loads(line)["cases"]]
        done = 0
        while done < len(cases):
            done += _run_some(root, cases[done:], answers, None if sanitized else ADDRESSES)
        print(file=answers, flush=True)


def _prepare(root: Path) -> None:
    import torch

    from tests.fuzz.bases import make_bases
    from tests.fuzz.patching import build_the_command_once, do_not_wait_for_the_disk

    torch.set_num_threads(1)  # no threads exist that a fork would lose
    do_not_wait_for_the_disk()
    build_the_command_once()
    faulthandler.enable()
    make_bases(root)
    # what a first use imports
    import datasets  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import transformers.models.gemma3.modeling_gemma3
    import yaml  # noqa: F401
    from transformers.models.auto import modeling_auto  # noqa: F401

    from gemma_awq_cli.awq.grid import minmax_grid
    from gemma_awq_cli.awq.packing import pack_weight
    from gemma_awq_cli.bench import html_page  # noqa: F401
    from gemma_awq_cli.kernels.autoawq import dequantize_with_autoawq

    weight = torch.zeros(8, 8)
    dequantize_with_autoawq(pack_weight(weight, minmax_grid(weight, 8)), 8)
    assert transformers is not None
    from gemma_awq_cli.kernels.native import library
    from gemma_awq_cli.models.checkpoints.cache import cache_folder

    library.load(cache_folder() / "native")
    gc.collect()
    gc.freeze()


def _run_some(root: Path, cases: list[Case], answers: Any, addresses: int | None) -> int:
    """Run cases in one fork until it ends: how many of them have an answer now.

    addresses: bytes of address space that it may take; None: all, as a sanitizer must.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        try:
            os.setsid()
            _child(root, cases, writing, addresses)
        except BaseException:  # noqa: BLE001 (an error of the harness itself)
            traceback.print_exc()
            os._exit(HARNESS_FAILED)
        os._exit(0)
    os.close(writing)
    done = 0
    buffer = b""
    killed = False
    deadline = time.monotonic() + WALL_SECONDS
    while True:
        ready, _, _ = select.select([reading], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            killed = True
            os.killpg(pid, signal.SIGKILL)
            break
        piece = os.read(reading, 1 << 16)
        if not piece:
            break
        buffer += piece
        *lines, buffer = buffer.split(b"\n")
        for line in lines:
            print(line.decode(), file=answers, flush=True)
            done += 1
            deadline = time.monotonic() + WALL_SECONDS
    os.close(reading)
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)  # whatever it left running
    if done < len(cases):
        work = root / "work"
        died = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"
        died = "a hang" if killed else f"{CPU_SECONDS} s of processor time" if died == "SIGXCPU" else died
        result = Result(died=died, stderr=_read(work.parent / "stderr"), stdout=_read(work.parent / "stdout"))
        print(json.dumps(asdict(result)), file=answers, flush=True)
        done += 1
    return done


def _child(root: Path, cases: list[Case], writing: int, addresses: int | None) -> None:
    if addresses is not None:
        resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + addresses,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for case in cases:
        result = run_case(root, case)
        os.write(writing, json.dumps(asdict(result)).encode() + b"\n")


def run_case(root: Path, case: Case) -> Result:
    """Lay the base out, damage it, run the command, see what came of it."""
    work = root / "work"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(root / case.base, work, symlinks=True)
    os.chdir(work)
    apply(work, case.steps)
    before = set(os.listdir(work))
    (root / "stdin").write_bytes(to_bytes(case.stdin))
    result = Result()
    with _Streams(root, case.terminal):
        _limit_processor_time()
        _forget_peak()
        resident, began, wall, children = _status("VmRSS"), _seconds(), time.monotonic(), _children_peak()
        try:
            result.code = _command(case)
        except BaseException:  # noqa: BLE001 (this is what is looked for)
            result.error = traceback.format_exc()
        result.seconds, result.wall = round(_seconds() - began, 3), round(time.monotonic() - wall, 3)
        largest = _children_peak()
        result.grown = max(0, _status("VmHWM") - resident, largest - resident if largest > children else 0)
    os.chdir(root)
    result.stdout, result.stderr = _read(root / "stdout"), _read(root / "stderr")
    result.notes = _look_around(work, case, before, result)
    return result


def _command(case: Case) -> int:
    from gemma_awq_cli.cli.app import main
    from tests.fuzz.patching import in_process_workers

    with in_process_workers():
        return main([_argument(one) for one in case.arguments])


def _argument(coded: Any) -> str:
    return to_bytes(coded).decode("utf-8", "surrogateescape")


def _look_around(work: Path, case: Case, before: set[str], result: Result) -> list[str]:
    """What the command left that it should not have."""
    notes = []
    made = set(os.listdir(work)) - before
    if "out" in made and result.code != 0 and not result.died:
        notes.append("a failed command left its output folder")
    written = (work / "out").rglob("*") if not (work / "out").is_symlink() else ()
    asked_for = any("secret.txt" in str(argument) for argument in case.arguments)  # by the user, who may read it
    for path in [*written, work / "page.html", work / "answers.jsonl"]:
        if _holds(path, CANARY) and not asked_for:
            notes.append(f"what lies outside the model is in {path.relative_to(work)}")
    if CANARY in result.stdout + result.stderr and not asked_for:
        notes.append("what lies outside the model was printed")
    if _holds(work / "page.html", "<script>alert"):
        notes.append("a script of the model's is in the page")
    compared = case.kind in COMPARED and case.arguments[0] == "run" and "not read" not in result.stderr
    if result.code == 0 and compared:
        from tests.fuzz.compare import disagreement

        wrong = disagreement(work / "model", work / "scratch")
        notes += [f"a wrong answer: {wrong}"] if wrong else []
    return notes


def _holds(path: Path, text: str) -> bool:
    """Whether a regular file holds a text near its beginning."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return text.encode() in file.read(2_000_000)


class _Streams:
    """Standard input, output and error of the command are files below `root`."""

    def __init__(self, root: Path, terminal: bool) -> None:
        self._root, self._terminal = root, terminal

    def __enter__(self) -> None:
        from tests.fuzz.patching import Terminal

        sys.stdout.flush()
        sys.stderr.flush()
        self._kept = [os.dup(number) for number in range(3)]
        self._objects = sys.stdin, sys.stdout, sys.stderr
        names = (
            ("stdin", os.O_RDONLY),
            *((name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for name in ("stdout", "stderr")),
        )
        for number, (name, flags) in enumerate(names):
            opened = os.open(self._root / name, flags, 0o600)
            os.dup2(opened, number)
            os.close(opened)
        kind: Any = Terminal if self._terminal else None
        binary = open(0, "rb", closefd=False)
        sys.stdin = kind(binary, encoding="utf-8") if kind else open(0, encoding="utf-8", closefd=False)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)

    def __exit__(self, *_: object) -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        sys.stdin, sys.stdout, sys.stderr = self._objects
        for number, kept in enumerate(self._kept):
            os.dup2(kept, number)
            os.close(kept)


def _read(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8", "backslashreplace")
    except OSError:
        return ""
    return text if len(text) <= TEXT_LIMIT else text[: TEXT_LIMIT // 2] + "\n[...]\n" + text[-TEXT_LIMIT // 2 :]


def _limit_processor_time() -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime) + CPU_SECONDS + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _children_peak() -> int:
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def _forget_peak() -> None:
    """The largest resident set so far is forgotten (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _status(name: str) -> int:
    """A size of this process in bytes, as Linux tells it."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    serve(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
