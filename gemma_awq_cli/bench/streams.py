"""Concurrent streams, as a server has them: `gemma-awq serve` in a process of its own, and N clients at once.

Each client sends its next request when its last is answered, as llama.cpp's and vLLM's own load tests do. So requests
join and leave while others run.
"""

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from gemma_awq_cli.bench.process import measured_environment
from gemma_awq_cli.bench.streaming_client import Answered, Asked, Client, closed_loop
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.system.saving import scratch_file

LOADING_SECONDS = 600.0  # in which the server must answer
ANSWER_SECONDS = 3600.0  # in which a request must be answered
SAMPLING = {"temperature": 1.0, "top_k": 64, "top_p": 0.95, "seed": 1}  # as Gemma's cards have it
_ASKING_SECONDS = 0.1  # between two questions whether the server is there


@dataclass(frozen=True)
class Streams:
    """What `streams` clients saw. seconds: from the first request to the end of the last answer.

    tokens: of all answers. first: seconds to the first token of each request. steps: seconds per further token of each
    request that had any.
    """

    streams: int
    seconds: float
    tokens: int
    first: Sequence[float]
    steps: Sequence[float]


@contextmanager
def served(folder: Path, device: str, threads: int | None, rows: int, context: int) -> Iterator[str]:
    """Run `gemma-awq serve` until the block ends; gives its URL, with /v1, when it answers.

    rows: the most requests that it answers at once; context: tokens of each. Raises GemmaAwqError if it does not start.
    """
    port = _free_port()
    command = [
        sys.executable, "-P", "-m", "gemma_awq_cli", "serve", str(folder), "--port", str(port), "--device", device,
        "--max-rows", str(rows), "--max-context", str(context), "--quiet",
    ]  # fmt: skip
    command += [] if threads is None else ["--threads", str(threads)]
    with scratch_file() as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=measured_environment(threads),
        )  # fmt: skip
        try:
            end = time.monotonic() + LOADING_SECONDS
            while not _answers(port):
                if process.poll() is not None or time.monotonic() > end:
                    errors.seek(0)
                    raise _not_started(folder, errors.read().decode(errors="replace").strip())
                time.sleep(_ASKING_SECONDS)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.kill()
            process.wait()


def measure_streams(url: str, streams: int, prompts: Sequence[Sequence[int]], new_tokens: int) -> Streams:
    """Let `streams` clients send prompts [N, P] of token ids to a server, and time their answers of `new_tokens`.

    Answers are sampled: greedy ones repeat themselves, which a server that drafts tokens gains from and users do not.
    Raises GemmaAwqError if a request is not answered.
    """
    asked = [Asked(prompt, new_tokens) for prompt in prompts]
    client = Client(url, None, None, ANSWER_SECONDS, SAMPLING)
    started = time.perf_counter()
    answers = asyncio.run(closed_loop(client, asked, streams))
    seconds = time.perf_counter() - started
    failed = next((answer.outcome for answer in answers if answer.outcome != "ok"), None)
    if failed is not None:
        raise GemmaAwqError(
            f"`gemma-awq serve` did not answer a request of {streams} streams: {failed}.", "Measure fewer --streams."
        )
    return Streams(streams, seconds, *_counted(answers))


def _counted(answers: Sequence[Answered]) -> tuple[int, list[float], list[float]]:
    """The tokens of all answers, and each one's times."""
    return (
        sum(answer.tokens for answer in answers),
        [answer.ttft for answer in answers],
        [answer.tpot for answer in answers if answer.tokens > 1],
    )


def _not_started(folder: Path, said: str) -> GemmaAwqError:
    first, *rest = said.splitlines() or ["it did not answer in time"]
    return GemmaAwqError(
        f"`gemma-awq serve` of {folder.name} failed: {first.removeprefix('error: ')}",
        " ".join(line.strip() for line in rest[:2]) or "Run it by itself to see more.",
    )


def _answers(port: int) -> bool:
    with closing(HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, HTTPException):
            return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
