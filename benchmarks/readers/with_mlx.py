"""mlx-lm on a CPU. The model computes in the dtype of its stored scales and norms, whatever `dtype` says."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
from exchange import Opened, Request, serve
from mlx_lm.utils import load_model

mx.set_default_device(mx.cpu)


def open_model(request: Request) -> Opened:
    model, _ = load_model(Path(request["model"]))

    def logits(ids: Sequence[int]) -> Iterator[np.ndarray]:
        yield from np.array(model(mx.array([[*ids]]))[0].astype(mx.float32))

    def greedy(prompt: Sequence[int], count: int) -> list[int]:
        ids = [*prompt]
        while len(ids) < len(prompt) + count:
            ids.append(int([*logits(ids)][-1].argmax()))
        return ids[len(prompt) :]

    return Opened(logits, greedy, ("mlx-lm", "mlx"))


serve(open_model)
