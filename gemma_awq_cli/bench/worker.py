"""The process that `bench` starts for each model: JSON lines in, JSON lines out, one answer per request.

    {"do": "load", "kind": "own", "path": "...", "device": "cpu", "threads": 2, "rows": 1, "tokens": 640}
    {"do": "sample", "before": [[]], "prompts": [[2, 17, ...]], "new_tokens": 128}
    {"do": "bandwidth"}
    {"do": "open", "kind": "own", "path": "...", "device": "cpu", "threads": 2}
    {"do": "task", "spec": {...}, "limit": null, "unsafe_code": false}
    {"do": "drafts", "path": "...", "device": "cpu", "threads": 2, "draft": "lookup", "tokens": 128, "rounds": 3}
    {"do": "fidelity", "kind": "nf4", "path": "...", "reference": "...", "text": "embedded", "window": null,
     "windows": null, "device": "cpu", "threads": 2}

`adapter` beside `path`, and `reference_adapter`, name folders of adapters that are merged into these checkpoints.

Lines {"done", "total"} may come before the answer to the last three. An error that a user can meet is the answer
{"error", "hint"}; any other exception ends the process with a traceback. The end of the input ends the process.
"""

import json
import os
import signal
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gemma_awq_cli.bench.events import OnProgress
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.kernels.head_kinds import DENSE_HEAD
from gemma_awq_cli.system.failures import unforeseen_error


class Server:
    """Answers requests about the model that it has loaded. on_progress: hears how far a long request is."""

    def __init__(self, on_progress: OnProgress = lambda done, total: None) -> None:
        self.on_progress = on_progress
        self.timed: Any = None  # of `load`
        self.opened: Any = None  # of `open`
        self.device: Any = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a request as plain data."""
        from gemma_awq_cli.bench import timing
        from gemma_awq_cli.models.forward.memory import peak_device_memory

        match request["do"]:
            case "load":
                return self._load(request)
            case "sample":
                sample = self.timed.sample(request["before"], request["prompts"], request["new_tokens"])
                memory = {"peak_rss": timing.peak_rss(), "peak_vram": peak_device_memory(self.device)}
                return {**asdict(sample), **memory}
            case "bandwidth":
                return {"bytes_per_second": timing.bandwidth(self.device)}
            case "open":
                from gemma_awq_cli.bench.model_kinds import open_kind

                self._set_up(request)
                # answers may be improbable, and a quantized head is exact for the probable tokens only
                self.opened = open_kind(
                    request["kind"], Path(request["path"]), self.device, DENSE_HEAD, request.get("adapter")
                )
                return {}
            case "task":
                from gemma_awq_cli.bench.task_run import run_task
                from gemma_awq_cli.bench.tasks import TaskSpec

                spec = TaskSpec(**request["spec"])
                return run_task(self.opened, spec, request["limit"], request["unsafe_code"], self.on_progress)
            case "drafts":
                return self._drafts(request)
            case "fidelity":
                from gemma_awq_cli.bench.runtime_fidelity import answer

                self._set_up(request)
                return answer(request, self.device, self.on_progress)
            case other:
                raise AssertionError(f"no request is called {other!r}")

    def _load(self, request: dict[str, Any]) -> dict[str, Any]:
        import torch

        from gemma_awq_cli.bench.timed_model import load

        self._set_up(request)
        path = Path(request["path"])
        self.timed = load(
            request["kind"], path, self.device, request["rows"], request["tokens"], request.get("adapter")
        )
        facts = {
            name: getattr(self.timed, name)
            for name in ("vocabulary", "bos", "context", "dtype", "weight_bytes", "load_seconds")
        }
        return {**facts, "threads": torch.get_num_threads(), "device": str(self.device)}

    def _drafts(self, request: dict[str, Any]) -> dict[str, Any]:
        from gemma_awq_cli.bench.drafts import measure_drafts
        from gemma_awq_cli.bench.model_kinds import OWN, open_kind

        self._set_up(request)
        opened = open_kind(OWN, Path(request["path"]), self.device)
        return measure_drafts(opened, request["draft"], request["tokens"], request["rounds"], self.on_progress)

    def _set_up(self, request: dict[str, Any]) -> None:
        import torch

        from gemma_awq_cli.models.forward.devices import pick_device

        if request["threads"] is not None:
            torch.set_num_threads(request["threads"])
        self.device = pick_device(request["device"])


def serve() -> None:
    """Answer requests until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends this process
    # answers keep standard output, and what a library prints goes to standard error
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)

        def send(answer: dict[str, Any]) -> None:
            answers.write(json.dumps(answer) + "\n")
            answers.flush()

        server = Server(lambda done, total: send({"done": done, "total": total}))
        # a parent that has ended reads no answer
        with suppress(BrokenPipeError):
            for line in sys.stdin:
                try:
                    answer = server.answer(json.loads(line))
                except GemmaAwqError as error:
                    answer = {"error": error.message, "hint": error.hint}
                except BrokenPipeError:
                    raise
                except (OSError, MemoryError) as error:
                    refused = unforeseen_error(error)
                    answer = {"error": refused.message, "hint": refused.hint}
                send(answer)


if __name__ == "__main__":
    serve()
