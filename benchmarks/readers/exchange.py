"""What every reader is asked and answers. Only the standard library and numpy: each reader has its own environment.

python READER.py REQUEST.json [...]

A request is {"model": PATH, "dtype": NAME, "ids": [...], "prompt": n, "new_tokens": m, ...}. The reader writes beside
it the logits after each of the ids, `logits.npy` as float32 [len(ids), vocabulary], and `answer.json`: {"tokens":
[...], "faults": [...], "versions": {...}}, or {"error": TEXT}. `tokens` are m greedy ones after the first n ids. Log
probabilities do as well as logits: only differences within a row are compared.
"""

import gc
import json
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Request = dict[str, Any]


class Opened(NamedTuple):
    """A model that a reader has opened.

    logits: ids -> the logits [V] after each id, as arrays of numpy; greedy: (prompt, count) -> the tokens; packages:
    the distributions whose versions matter; faults: what the reader missed or left unread, as lines.
    """

    logits: Callable[[Sequence[int]], Iterable[Any]]
    greedy: Callable[[Sequence[int], int], Sequence[int]]
    packages: Sequence[str]
    faults: Sequence[str] = ()


def serve(open_model: Callable[[Request], Opened]) -> None:
    """Answer every request that this process was started with, one model at a time."""
    for path in map(Path, sys.argv[1:]):
        request = json.loads(path.read_text(encoding="utf-8"))
        try:
            answer = _answer(open_model(request), request, path.parent / "logits.npy")
        except Exception as error:  # noqa: BLE001 - whatever a reader raises is its answer
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        (path.parent / "answer.json").write_text(json.dumps(answer), encoding="utf-8")
        gc.collect()


def _answer(opened: Opened, request: Request, path: Path) -> dict[str, Any]:
    ids = request["ids"]
    table, rows = None, 0
    for rows, row in enumerate(opened.logits(ids), 1):
        if table is None:
            table = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(len(ids), len(row)))
        table[rows - 1] = row
    if rows != len(ids):
        raise ValueError(f"{rows} rows of logits for {len(ids)} tokens")
    return {
        "tokens": [int(token) for token in opened.greedy(ids[: request["prompt"]], request["new_tokens"])],
        "faults": [*opened.faults],
        "versions": {name: version(name) for name in opened.packages},
    }
