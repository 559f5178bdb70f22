"""The process that `bench` starts for each model: JSON lines in, JSON lines out, one answer a request.

    {"do": "load", "kind": "own", "path": "...", "device": "cpu", "threads": 2, "rows": 1, "tokens": 640}
    {"do": "sample", "prompts": [[2, 17, ...]], "new_tokens": 128}
    {"do": "bandwidth"}
    {"do": "open", "kind": "own", "path": "...", "device": "cpu", "threads": 2}
    {"do": "task", "spec": {...}, "limit": null, "unsafe_code": false}
    {"do": "fidelity", "kind": "nf4", "path": "...", "reference": "...", "text": "embedded", "window": null,
     "windows": null, "device": "cpu", "threads": 2}

Before the answer to the last two there may be lines {"done", "total"} on how far it is.
An error that a user can meet is an answer {"error", "hint"}. The end of the input ends the process.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.kernels.head import DENSE_HEAD
from gemma_awq_cli.system.failures import unforeseen


class _Server:
    """What is loaded, and the answers to requests about it. on_progress: told of a long request how much is done."""

    def __init__(self, on_progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        self.on_progress = on_progress
        self.subject: Any = None
        self.opened: Any = None
        self.device: Any = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        from gemma_awq_cli.bench import speed

        match request["do"]:
            case "load":
                return self._load(request)
            case "sample":
                sample = speed.sample(self.subject, request["prompts"], request["new_tokens"])
                memory = {"peak_rss": speed.peak_rss(), "peak_vram": speed.peak_vram(self.device)}
                return {**asdict(sample), **memory}
            case "bandwidth":
                return {"bytes_per_second": speed.bandwidth(self.device)}
            case "open":
                self._set_up(request)
                # answers may be improbable, and a coarse head is exact for the probable tokens only
                self.opened = speed.open_kind(request["kind"], Path(request["path"]), self.device, DENSE_HEAD)
                return {}
            case "task":
                from gemma_awq_cli.bench.tasks import TaskSpec, run_task

                spec = TaskSpec(**request["spec"])
                return run_task(self.opened, spec, request["limit"], request["unsafe_code"], self.on_progress)
            case "fidelity":
                from gemma_awq_cli.bench.runtime_fidelity import answer

                self._set_up(request)
                return answer(request, self.device, self.on_progress)
            case other:
                raise AssertionError(f"no request is called {other!r}")

    def _load(self, request: dict[str, Any]) -> dict[str, Any]:
        import torch

        from gemma_awq_cli.bench import speed

        self._set_up(request)
        path = Path(request["path"])
        self.subject = speed.load(request["kind"], path, self.device, request["rows"], request["tokens"])
        facts = {
            name: getattr(self.subject, name)
            for name in ("vocabulary", "bos", "context", "dtype", "weight_bytes", "load_seconds")
        }
        return {**facts, "threads": torch.get_num_threads(), "device": str(self.device)}

    def _set_up(self, request: dict[str, Any]) -> None:
        import torch

        from gemma_awq_cli.models.forward.loading import pick_device

        if request["threads"] is not None:
            torch.set_num_threads(request["threads"])
        self.device = pick_device(request["device"])


def serve() -> None:
    """Answer requests until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends this process
    # answers go where the output went; what a library prints must not mix with them
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)

        def send(answer: dict[str, Any]) -> None:
            answers.write(json.dumps(answer) + "\n")
            answers.flush()

        server = _Server(lambda done, total: send({"done": done, "total": total}))
        # whoever asked may be gone: nobody wants the answer then
        with suppress(BrokenPipeError):
            for line in sys.stdin:
                try:
                    answer = server.answer(json.loads(line))
                except GemmaAwqError as error:
                    answer = {"error": error.message, "hint": error.hint}
                except BrokenPipeError:
                    raise
                except (OSError, MemoryError) as error:
                    refused = unforeseen(error)
                    answer = {"error": refused.message, "hint": refused.hint}
                send(answer)


if __name__ == "__main__":
    serve()
