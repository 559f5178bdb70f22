"""mlx-lm on a CPU. The model computes in the dtype of its stored scales and norms, whatever `dtype` says."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
from exchange import Opened, Request, serve
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

mx.set_default_device(mx.cpu)


def open_model(request: Request) -> Opened:
    model, _ = load_model(Path(request["model"]))

    def logits(ids: Sequence[int]) -> Iterator[np.ndarray]:
        yield from np.array(model(mx.array([[*ids]]))[0].astype(mx.float32))

    def greedy(prompt: Sequence[int], count: int) -> list[int]:
        cache, chosen, unread = make_prompt_cache(model), list[int](), [*prompt]
        while len(chosen) < count:
            chosen.append(int(model(mx.array([unread]), cache=cache)[0, -1].argmax()))
            unread = chosen[-1:]
        return chosen

    return Opened(logits, greedy, ("mlx-lm", "mlx"))


serve(open_model)
