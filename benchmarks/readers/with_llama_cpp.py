"""llama.cpp through llama-cpp-python. The model is a GGUF file."""

from collections.abc import Iterator, Sequence

import llama_cpp
import numpy as np
from exchange import Opened, Request, serve


def open_model(request: Request) -> Opened:
    capacity = len(request["ids"]) + request["new_tokens"]
    llama = llama_cpp.Llama(request["model"], n_ctx=capacity, n_batch=capacity, logits_all=True, verbose=False)

    def logits(ids: Sequence[int]) -> Iterator[np.ndarray]:
        llama.reset()
        llama.eval([*ids])
        yield from llama.scores[: len(ids)]

    def greedy(prompt: Sequence[int], count: int) -> list[int]:
        llama.reset()
        fresh, tokens = [*prompt], []
        while len(tokens) < count:
            llama.eval(fresh)
            fresh = [int(llama.scores[llama.n_tokens - 1].argmax())]
            tokens += fresh
        return tokens

    return Opened(logits, greedy, ("llama-cpp-python",))


serve(open_model)
