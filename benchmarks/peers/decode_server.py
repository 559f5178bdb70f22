"""What every decode peer shares: requests on stdin, times on stdout, one JSON line each. Standard library only.

A request is {"ids": [...], "tokens": n}; the answer {"prefill": s, "decode": s, "ids": [...], "rss": bytes}.
`prefill` ends with the first token, `decode` is the time of the n - 1 tokens after it; both are greedy.
"""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence


def serve(start: float, open_row: Callable[[], Callable[[Sequence[int]], int]]) -> None:
    """open_row: a new empty context, as a function that reads tokens and gives the most probable next one."""

    def answer(ids: Sequence[int], count: int) -> tuple[list[int], float, float]:
        read = open_row()
        begin = time.perf_counter()
        tokens = [read(ids)]
        middle = time.perf_counter()
        while len(tokens) < count:
            tokens.append(read(tokens[-1:]))
        return tokens, middle - begin, time.perf_counter() - middle

    serve_whole(start, answer)


def serve_whole(start: float, answer: Callable[[Sequence[int], int], tuple[list[int], float, float]]) -> None:
    """answer: (ids, count) -> (tokens, seconds to the first, seconds of the others)."""
    print(json.dumps({"load": time.time() - start}), flush=True)
    for request in requests():
        tokens, prefill, decode = answer(request["ids"], request["tokens"])
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"prefill": prefill, "decode": decode, "ids": tokens, "rss": rss}), flush=True)


def requests() -> Iterator[dict]:
    for line in sys.stdin:
        yield json.loads(line)
