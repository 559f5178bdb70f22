"""One repetition of a speed measurement, and what else a process measures of itself: memory and the memory's bandwidth.

A repetition is two parts. One answers a prompt, as a server does: the time to the first token, then each further one.
The other decodes from BOS alone, as llama-bench's tg does. Both may come after tokens that were read before, as
llama-bench's -d has it. Every time ends when the next token is known on the host, which also waits for the device.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gemma_awq_cli.generate.local_engine import require_finite_logits
from gemma_awq_cli.models.forward.cached_session import CachedSession
from gemma_awq_cli.models.forward.memory import peak_memory
from gemma_awq_cli.models.forward.session import Logits, Session

BANDWIDTH_BYTES = 256 << 20  # more than any cache holds
BANDWIDTH_TRIES = 5


@dataclass(frozen=True)
class Sample:
    """One repetition, in seconds.

    first: from the prompt to the first token. steps: each further token after it. decode: decoding as many tokens from
    BOS alone, or from the tokens that were read before.
    """

    first: float
    steps: list[float]
    decode: float


def time_sessions(
    open_session: Callable[[int, int], Session],
    bos: int,
    before: Sequence[Sequence[int]],
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
) -> Sample:
    """Time one repetition. open_session: (rows, capacity) -> a new session. before, prompts: [R, D], [R, P] token ids.

    before: what the rows have read already; D may be 0. Raises an error if the model's output is NaN or infinite.
    """
    rows, depth = len(prompts), len(before[0])
    session = open_session(rows, depth + len(prompts[0]) + new_tokens)
    marks = None
    if depth:
        session.next_logits(before)
        if isinstance(session, CachedSession):
            marks = [session.mark_row(row) for row in range(rows)]
    started = time.perf_counter()
    tokens = _most_likely(session.next_logits(prompts))
    first = time.perf_counter() - started
    steps = []
    for _ in range(new_tokens):
        started = time.perf_counter()
        tokens = _most_likely(session.next_logits(tokens))
        steps.append(time.perf_counter() - started)
    if marks is not None and isinstance(session, CachedSession):
        for row, mark in enumerate(marks):
            session.shorten_row(row, depth, mark)
        tokens = [[bos]] * rows  # any token: `before` is not read a second time only to know the next one
    else:
        del session  # its cache, before the next session makes one
        session = open_session(rows, max(depth, 1) + new_tokens)
        tokens = _most_likely(session.next_logits(before if depth else [[bos]] * rows))
    started = time.perf_counter()
    for _ in range(new_tokens):
        logits = session.next_logits(tokens)
        tokens = _most_likely(logits)
    decode = time.perf_counter() - started
    require_finite_logits(logits)
    return Sample(first, steps, decode)


def _most_likely(logits: Logits) -> list[list[int]]:
    """The most likely next token of each row. The end of text does not end a measurement."""
    return [[int(token)] for token in logits.argmax(-1).tolist()]


def bandwidth(device: torch.device) -> float:
    """Return the bytes/s that the device reads from memory: the best of several dot products of one large vector."""
    vector = torch.ones(BANDWIDTH_BYTES // 4, device=device)
    best = 0.0
    for _ in range(BANDWIDTH_TRIES):
        started = time.perf_counter()
        float(torch.dot(vector, vector))
        best = max(best, vector.nbytes / (time.perf_counter() - started))
    return best


def peak_rss() -> int | None:
    """Return the largest resident set of this process in bytes, or None where the system does not tell.

    On Linux a new program inherits the figure of `getrusage` from the process that started it, so there the figure
    comes from the process's own status file.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return peak_memory()
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")), None)


def peak_vram(device: torch.device) -> int | None:
    """Return the most GPU memory that torch has allocated, in bytes; None if the device is no GPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
