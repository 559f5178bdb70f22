"""A process for one model, asked one thing at a time: the parent's end of `bench.worker`."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from typing import Any

from gemma_awq_cli.bench.events import OnProgress
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.system.saving import scratch_file

ENDING_SECONDS = 10.0  # that a process which has closed its answers is given to end
CACHE, OPTIONS = "GEMMA_AWQ_CACHE", "GEMMA_AWQ_"  # the former's folder is everybody's
TRACEBACK = "Traceback (most recent call last):"


def measured_environment(threads: int | None) -> dict[str, str]:
    """Return the environment of a process that is measured, in which no variable sets an option of a command.

    threads: None for torch's choice.
    """
    own = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    inherited = {name: value for name, value in os.environ.items() if name == CACHE or not name.startswith(OPTIONS)}
    return {**inherited, **own}


class WorkerEndedError(GemmaAwqError):
    """The process has ended, and nothing can be asked of it any more.

    output: the traceback of the exception that ended it, which is a bug of this tool or of a library; else empty.
    """

    def __init__(self, message: str, hint: str = "", output: str = "") -> None:
        super().__init__(message, hint)
        self.output = output


class Worker:
    """A process of `bench.worker`. name: of its model, for messages. threads: None for torch's choice."""

    def __init__(self, name: str, threads: int | None) -> None:
        self.name = name
        self._output = scratch_file()
        read, write = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "gemma_awq_cli.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=write,
            stderr=self._output,
            env=measured_environment(threads),
        )
        os.close(write)
        self._answers = os.fdopen(read, encoding="utf-8")

    def ask(self, on_progress: OnProgress = lambda done, total: None, **request: Any) -> dict[str, Any]:
        """Send a request and return the answer. Raises the error that it answers with, or that it has ended.

        on_progress: hears how far a long request is.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
            while True:
                line = self._answers.readline()
                if not line.endswith("\n"):  # the end, or an answer that the process's end cut off
                    raise self._ended()
                answer = json.loads(line)
                if "done" not in answer:
                    break
                on_progress(answer["done"], answer["total"])
        except BrokenPipeError:
            raise self._ended() from None
        if "error" in answer:
            raise GemmaAwqError(answer["error"], answer["hint"])
        return dict(answer)

    def _ended(self) -> WorkerEndedError:
        try:
            code: int | None = self.process.wait(ENDING_SECONDS)
        except subprocess.TimeoutExpired:  # a library's threads may keep it from ending; `end` kills it
            code = None
        if code == -9:
            return WorkerEndedError(
                f"The process that measured {self.name} was killed, as happens when memory runs out.",
                "Measure fewer models at once, or use a machine with more memory.",
            )
        self._output.seek(0)
        output = self._output.read().decode(errors="replace").strip()
        reason = output.splitlines()[-1] if output else f"exit code {code}"
        _, found, traceback = output.rpartition(TRACEBACK)
        message = f"The process that measured {self.name} ended: {reason}"
        return WorkerEndedError(message, output=f"{found}{traceback}" if found else "")

    def end(self) -> None:
        """End the process, whatever it is doing."""
        self.process.kill()
        self.process.wait()
        if self.process.stdin is not None:
            with suppress(BrokenPipeError):  # of a request that a dead process never read
                self.process.stdin.close()
        self._answers.close()
        self._output.close()
