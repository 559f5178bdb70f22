"""What every reader is asked and answers. Only the standard library and numpy: each reader has its own environment.

python READER.py REQUEST.json

The request is {"model": PATH, "dtype": NAME, "ids": [...], "prompt": n, "new_tokens": m, "answer": FOLDER, ...}. The
reader writes into FOLDER the logits after each of the ids, `logits.npy` as float32 [len(ids), vocabulary], and
`answer.json`: {"tokens": [...], "faults": [...], "versions": {...}}. `tokens` are m greedy ones after the first n ids.
Log probabilities do as well as logits: only differences within a row are compared.
"""

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

Request = dict[str, Any]


def read_request() -> Request:
    """Return the request that this process was started with."""
    request: Request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    return request


def write_answer(
    request: Request,
    logits: Callable[[Sequence[int]], Iterable[Any]],
    greedy: Callable[[Sequence[int], int], Sequence[int]],
    packages: Sequence[str],
    faults: Sequence[str] = (),
) -> None:
    """Ask an opened reader, and write what it says.

    logits: ids -> the logits [V] after each id, as arrays of numpy. greedy: (prompt, count) -> the tokens. packages:
    the distributions whose versions matter. faults: what the reader missed or left unread, as lines.
    """
    folder, ids = Path(request["answer"]), request["ids"]
    table = None
    rows = 0
    for rows, row in enumerate(logits(ids), 1):
        if table is None:
            path, shape = folder / "logits.npy", (len(ids), len(row))
            table = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
        table[rows - 1] = row
    if rows != len(ids):
        raise SystemExit(f"{rows} rows of logits for {len(ids)} tokens")
    answer = {
        "tokens": [int(token) for token in greedy(ids[: request["prompt"]], request["new_tokens"])],
        "faults": [*faults],
        "versions": {name: version(name) for name in packages},
    }
    (folder / "answer.json").write_text(json.dumps(answer), encoding="utf-8")


def extend(read: Callable[[Sequence[int]], Any], prompt: Sequence[int], count: int) -> list[int]:
    """Return `count` greedy tokens, where `read` returns the logits [V] after a whole text. Reads it anew each time."""
    ids = [*prompt]
    for _ in range(count):
        ids.append(int(read(ids).argmax()))
    return ids[len(prompt) :]
