"""Stands for a `bench.process.Worker` in the tests' own process: a new Python with torch takes seconds."""

import json
from typing import Any

from gemma_awq_cli.bench.worker import Server


class InProcess:
    """Answers as a worker does, through JSON both ways."""

    def __init__(self, name: str, threads: int | None) -> None:
        self._server = Server()

    def ask(self, on_progress: Any = None, **request: Any) -> dict[str, Any]:
        self._server.on_progress = on_progress or (lambda done, total: None)
        answer: dict[str, Any] = json.loads(json.dumps(self._server.answer(json.loads(json.dumps(request)))))
        return answer

    def end(self) -> None:
        pass
