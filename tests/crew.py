"""Several processes that run one command together, as a launcher starts them, and one of which may be killed.

A process that has imported everything once is forked for each of them.
"""

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import make_cache

# Reads commands as JSON lines, answers with the exit code (or minus the signal) and the output of each process.
# What the first process of a command imports, it imports too.
SERVER = """
import contextlib, importlib, json, os, signal, sys
os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
import torch
torch.set_num_threads(1)  # no threads exist that a fork would lose
import torch.distributed, gemma_awq_cli.quantize.pipeline, gemma_awq_cli.cli.quantize
import transformers.models.gemma2.modeling_gemma2
from gemma_awq_cli.cli.app import main
from gemma_awq_cli.quantize import processes
processes.BEAT_SECONDS, processes.LOST_SECONDS = 0.1, 3.0  # a process that is killed says nothing
imported = set(sys.modules)
WATCHED = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}
for line in sys.stdin:
    order = json.loads(line)
    children = []
    for rank in range(order["count"]):
        pid = os.fork()
        if pid == 0:
            output = os.open(f"{order['outputs']}/{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(order["count"]), MASTER_PORT=str(order["port"]))
            seen = 0
            def hook(event, arguments):
                global seen
                if event in WATCHED and order["below"] in str(arguments[0]):
                    seen += 1
                    if seen == order["at_operation"]:
                        os.kill(os.getpid(), signal.SIGKILL)
            if rank == order["killed"]:
                sys.addaudithook(hook)
            code = main(order["arguments"])
            sys.stdout.flush()
            if rank == 0:
                with open(f"{order['outputs']}/imported", "w") as file:
                    json.dump(list(set(sys.modules) - imported), file)
            os._exit(code)
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    if codes[0] >= 0:
        with open(f"{order['outputs']}/imported") as file:
            names = json.load(file)
        for name in names:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        imported.update(names)
    print("answer", json.dumps(codes), flush=True)
"""


@dataclass(frozen=True)
class Ended:
    """codes, outputs: of each process, by its number."""

    codes: list[int]
    outputs: list[str]


class Crew:
    """Starts processes in `folder`, below whose `work` their file operations are counted."""

    def __init__(self, folder: Path, native_folder: Path) -> None:
        self._folder = folder
        cache = make_cache(folder / "cache", native_folder)
        (folder / "outputs").mkdir(exist_ok=True)
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "GEMMA_AWQ_CACHE": str(cache)},
        )  # fmt: skip

    def run(self, arguments: list[str], count: int, killed: int = -1, at_operation: int = 0) -> Ended:
        """Run a command in `count` processes. Number `killed` dies at that one of its file operations."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        order = {
            "arguments": arguments, "count": count, "killed": killed, "at_operation": at_operation, "port": port,
            "below": str(self._folder / "work"), "outputs": str(self._folder / "outputs"),
        }  # fmt: skip
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        while line := self._server.stdout.readline():
            if line.startswith("answer "):
                outputs = [(self._folder / "outputs" / str(rank)).read_text() for rank in range(count)]
                return Ended(json.loads(line.removeprefix("answer ")), outputs)
        raise AssertionError("the server died")

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(timeout=30)
