"""How far a model is from its 16-bit original as it runs here: bitsandbytes' linears, float16, a GGUF in llama.cpp.

An artifact's own fidelity is that of its stored weights (`measuring_fidelity`). What another library holds cannot be
read like that, so here the whole model runs, with its arithmetic, against the original in float32, layer by layer.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_awq_cli.awq.precision import matmul_precision
from gemma_awq_cli.bench.llama_cpp import LlamaModel
from gemma_awq_cli.bench.speed import GGUF, open_kind
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.fidelity.comparison import Text, require_finite, through_layers
from gemma_awq_cli.fidelity.metrics import Positions, compare, join
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.staging import write_errors
from gemma_awq_cli.models.forward.hidden_states import HiddenStates
from gemma_awq_cli.models.forward.layerwise import TextStack
from gemma_awq_cli.models.forward.session import Session
from gemma_awq_cli.system.saving import scratch_folder

POSITIONS = 128  # whose logits are held at a time

OpenSession = Callable[[int, int], Session]


def open_running(kind: str, path: Path, text: Text, device: torch.device) -> OpenSession:
    """The model to be run over `text`; an error if it reads the text differently."""
    if kind != GGUF:
        return open_kind(kind, path, device).session
    model = LlamaModel(path, text.rows.shape[1], torch.get_num_threads())
    wanted = text.rows[:, 1:].flatten().tolist()
    if model.ids(text.plain)[: len(wanted)] != wanted:
        raise GemmaAwqError(
            f"{path} has another tokenizer than the 16-bit original: they read the same text differently.",
            "Compare with a GGUF file of the same model.",
        )
    return model.session


@torch.inference_mode()
def measure_running(
    open_session: OpenSession, reference: Checkpoint, rows: Tensor, device: torch.device, on_step: Callable[[], None]
) -> Positions:
    """The comparison of every next token of `rows` [R, S]: `steps` of the layers once, and one for each row."""
    stack = TextStack(reference, device)
    layers = reference.layers
    parts = []
    with scratch_folder() as scratch, matmul_precision("highest"):
        with write_errors(scratch, "set TMPDIR to another folder"):
            hidden = HiddenStates(scratch, len(rows), 0, rows.shape[1], int(stack.config.hidden_size))
            hidden.start(rows, stack.embedder(rows))
            through_layers(stack, [(hidden, stack.read_layer)], device, on_step)
        norm, head = stack.head()
        for number, row in enumerate(rows.tolist()):
            states = hidden.read(layers, slice(number, number + 1))[0].to(device)
            session = open_session(1, len(row))
            for first in range(0, len(row) - 1, POSITIONS):
                ids = row[first : min(first + POSITIONS, len(row) - 1)]
                logits = session.last_logits([ids], [len(ids)]).to(device)
                exact = stack.logit_chunks(head, norm(states[first : first + len(ids)]))
                targets = torch.tensor(row[first + 1 : first + 1 + len(ids)], device=device)
                parts.append(compare(_beside(exact, logits), targets))
            on_step()
    return require_finite(join(parts), "the model as it runs, or of its original,")


def steps(rows: Tensor, layers: int) -> int:
    """How many steps of progress `measure_running` makes."""
    return layers + len(rows)


def _beside(chunks: Iterator[Tensor], logits: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Each chunk of the vocabulary with the same entries of `logits` [n, V]."""
    first = 0
    for chunk in chunks:
        yield chunk, logits[:, first : first + chunk.shape[1]].float()
        first += chunk.shape[1]


def answer(request: dict[str, Any], device: torch.device, on_progress: Callable[[int, int], None]) -> dict[str, Any]:
    """What a bench's process is asked for; see `bench.worker`."""
    from gemma_awq_cli.fidelity.comparison import described, read_asked

    reference = Checkpoint(Path(request["reference"]))
    text = read_asked(reference, request["text"], request["window"], request["windows"])
    total, done = steps(text.rows, reference.layers), 0

    def on_step() -> None:
        nonlocal done
        done += 1
        on_progress(done, total)

    session = open_running(request["kind"], Path(request["path"]), text, device)
    positions = measure_running(session, reference, text.rows, device, on_step)
    return described(positions, text)
