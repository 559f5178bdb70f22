"""The parent's end of `bench.worker`: a process for one model, asked one thing at a time."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.system.saving import scratch_file


class WorkerEndedError(GemmaAwqError):
    """The process died: nothing can be asked of it any more."""


ENDING_SECONDS = 10.0  # that a process which said its last word is given to end

Progress = Callable[[int, int], None]  # done, total


class Worker:
    """A process of `bench.worker`, asked one thing at a time."""

    def __init__(self, name: str, threads: int | None) -> None:
        self.name = name
        own = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
        self._chatter = scratch_file()
        read, write = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "gemma_awq_cli.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=write,
            stderr=self._chatter,
            env={**os.environ, **own},
        )
        os.close(write)
        self._answers = os.fdopen(read, encoding="utf-8")

    def ask(self, on_progress: Progress = lambda done, total: None, **request: Any) -> dict[str, Any]:
        """Send a request and wait for the answer; its error, or the process's end, is an error.

        on_progress: told of a long request how much is done.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            while True:
                line = self._answers.readline()
                if not line.endswith("\n"):  # the end, or an answer that the process's end cut off
                    raise self._died()
                answer = json.loads(line)
                if "done" not in answer:
                    break
                on_progress(answer["done"], answer["total"])
        except BrokenPipeError:
            raise self._died() from None
        if "error" in answer:
            raise GemmaAwqError(answer["error"], answer["hint"])
        return dict(answer)

    def _died(self) -> WorkerEndedError:
        try:
            code: int | None = self._process.wait(ENDING_SECONDS)
        except subprocess.TimeoutExpired:  # a library's threads may keep it from ending; `end` kills it
            code = None
        self._chatter.seek(0)
        said = self._chatter.read().decode(errors="replace").strip().splitlines()
        if code == -9:
            return WorkerEndedError(
                f"The process that measured {self.name} was killed, as when memory runs out.",
                "Measure fewer models at once, or on a machine with more memory.",
            )
        reason = said[-1] if said else f"exit code {code}"
        return WorkerEndedError(f"The process that measured {self.name} ended: {reason}", "")

    def end(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):  # of a request that a dead process never read
                self._process.stdin.close()
        self._answers.close()
        self._chatter.close()
