"""What the harness changes of the command while it runs cases: no new process for a bench, no waiting for the disk."""

import functools
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class InProcess:
    """Answers like `bench.process.Worker`, in this process: a new Python with torch takes seconds."""

    def __init__(self, name: str, threads: int | None) -> None:
        from gemma_awq_cli.bench.worker import Server

        self._server = Server()

    def ask(self, on_progress: Any = None, **request: Any) -> dict[str, Any]:
        if request["do"] == "bandwidth":  # of the machine, not of a model: a tenth of a second
            return {"bytes_per_second": 1e10}
        answer: dict[str, Any] = json.loads(json.dumps(self._server.answer(json.loads(json.dumps(request)))))
        return answer

    def end(self) -> None:
        pass


@contextmanager
def in_process_workers() -> Iterator[None]:
    from gemma_awq_cli.bench import process

    real = process.Worker
    process.Worker = InProcess  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        process.Worker = real  # type: ignore[misc]


class Terminal(io.TextIOWrapper):
    """Standard input that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def do_not_wait_for_the_disk() -> None:
    os.fsync = lambda descriptor: None


def build_the_command_once() -> None:
    """Typer builds its parser anew for every command line, which takes a third of a short case's time."""
    import typer.main

    typer.main.get_command = functools.cache(typer.main.get_command)  # type: ignore[assignment]
