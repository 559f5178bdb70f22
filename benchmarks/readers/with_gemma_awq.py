"""This tool: the artifact as `gemma-awq run` opens it on a CPU, one token after the other. `head` as in its --head."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from exchange import Opened, Request, serve

from gemma_awq_cli.models.forward import loading


def open_model(request: Request) -> Opened:
    model = loading.open_model(Path(request["model"]), torch.device("cpu"), head=request["head"])
    capacity = len(request["ids"]) + request["new_tokens"]

    def logits(ids: Sequence[int]) -> Iterator[np.ndarray]:
        session = model.session(1, capacity)
        for token in ids:
            yield session.next_logits([[token]])[0]

    def greedy(prompt: Sequence[int], count: int) -> list[int]:
        session = model.session(1, capacity)
        tokens = [int(session.next_logits([[*prompt]])[0].argmax())]
        while len(tokens) < count:
            tokens.append(int(session.next_logits([[tokens[-1]]])[0].argmax()))
        return tokens

    slow = model.slow_kernels()
    return Opened(logits, greedy, ("gemma-awq", "torch"), [] if slow is None else [slow])


with torch.inference_mode():
    serve(open_model)
