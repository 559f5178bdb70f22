"""The protocol of every decode peer: requests on stdin, answers on stdout, one JSON line each. Standard library only.

A request is {"ids": [...], "tokens": n}; the answer {"prefill": s, "decode": s, "ids": [...], "rss": bytes}.
`prefill` is the time to the first token, `decode` the time of the n - 1 tokens after it. Tokens are chosen greedily.

A request {"ids": [...], "logits": PATH} asks for the logits after each of the ids as decoding computes them, one token
after the other. They are written to the file PATH as float32 [len(ids), vocabulary]. The answer is {"logits": PATH}.
"""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any


def serve(start: float, open_row: Callable[[], Callable[[Sequence[int]], Any]]) -> None:
    """Serve a model. open_row returns a function with an empty context, which reads tokens and returns logits [V]."""

    def answer(ids: Sequence[int], count: int) -> tuple[list[int], float, float]:
        read = open_row()
        begin = time.perf_counter()
        tokens = [int(read(ids).argmax())]
        middle = time.perf_counter()
        while len(tokens) < count:
            tokens.append(int(read(tokens[-1:]).argmax()))
        return tokens, middle - begin, time.perf_counter() - middle

    def logits(ids: Sequence[int]) -> Iterable[Any]:
        read = open_row()
        return (read([token]) for token in ids)

    serve_whole(start, answer, logits)


def serve_whole(
    start: float,
    answer: Callable[[Sequence[int], int], tuple[list[int], float, float]],
    logits: Callable[[Sequence[int]], Iterable[Any]],
) -> None:
    """Serve a model that only generates whole answers.

    answer: (ids, count) -> (tokens, seconds to the first, seconds of the others). logits: ids -> the logits [V] after
    each id, as arrays of numpy or torch.
    """
    print(json.dumps({"load": time.time() - start}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "logits" in request:
            with open(request["logits"], "wb") as file:
                for row in logits(request["ids"]):
                    file.write(_float32(row))
            print(json.dumps({"logits": request["logits"]}), flush=True)
            continue
        tokens, prefill, decode = answer(request["ids"], request["tokens"])
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"prefill": prefill, "decode": decode, "ids": tokens, "rss": rss}), flush=True)


def _float32(row: Any) -> bytes:
    if hasattr(row, "float"):
        row = row.float().numpy()
    return row.astype("float32").tobytes()
