"""The fidelity of a model as it runs here: bitsandbytes' linears, float16, or a GGUF file in llama.cpp.

An artifact's own fidelity is that of its stored weights (`fidelity.comparison`). What another library holds cannot be
read like that, so here the whole model runs, with its own arithmetic, and is compared with the original in float32,
which runs layer by layer.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_awq_cli.awq.precision import matmul_precision
from gemma_awq_cli.bench.document import fidelity_record
from gemma_awq_cli.bench.events import OnProgress, counted
from gemma_awq_cli.bench.llama_cpp import LlamaModel
from gemma_awq_cli.bench.model_kinds import GGUF, adapter_in, open_kind
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.fidelity.comparison import require_finite, through_layers
from gemma_awq_cli.fidelity.evaluation_text import EvaluationText, read_evaluation_text
from gemma_awq_cli.fidelity.metrics import Positions, compare, join
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.staging import write_errors
from gemma_awq_cli.models.forward.hidden_states import HiddenStates
from gemma_awq_cli.models.forward.layerwise import TextStack
from gemma_awq_cli.models.forward.session import Session
from gemma_awq_cli.system.arrays import as_tensor
from gemma_awq_cli.system.saving import scratch_folder

POSITIONS = 128  # whose logits are held at a time

OpenSession = Callable[[int, int], Session]  # rows, capacity


def answer(request: dict[str, Any], device: torch.device, on_progress: OnProgress) -> dict[str, Any]:
    """Return the answer to the worker's request `fidelity` (see `bench.worker`)."""
    reference = Checkpoint(Path(request["reference"]), adapter_in(request.get("reference_adapter")))
    text = read_evaluation_text(request["text"], reference, request["window"], request["windows"])
    open_session = open_running(request["kind"], Path(request["path"]), text, device, request.get("adapter"))
    step = counted(running_steps(text.rows, reference.layers), on_progress)
    return fidelity_record(measure_running(open_session, reference, text.rows, device, step), text)


def open_running(
    kind: str, path: Path, text: EvaluationText, device: torch.device, adapter: str | None = None
) -> OpenSession:
    """Open the model that is to run over `text`. Raises an error if it reads the text differently."""
    if kind != GGUF:
        return open_kind(kind, path, device, adapter=adapter).session
    model = LlamaModel(path, text.rows.shape[1], torch.get_num_threads())
    wanted = text.rows[:, 1:].flatten().tolist()
    if model.ids(text.plain)[: len(wanted)] != wanted:
        raise GemmaAwqError(
            f"{path} has another tokenizer than the 16-bit original: they read the same text differently.",
            "Compare with a GGUF file of the same model.",
        )
    return model.session


def running_steps(rows: Tensor, layers: int) -> int:
    """Return how often `measure_running` calls `on_step`."""
    return layers + len(rows)


@torch.inference_mode()
def measure_running(
    open_session: OpenSession, reference: Checkpoint, rows: Tensor, device: torch.device, on_step: Callable[[], None]
) -> Positions:
    """Compare the predictions of every next token of `rows` [R, S]: a step for each layer, then one for each row."""
    stack = TextStack(reference, device)
    layers = reference.layers
    parts = []
    with scratch_folder() as scratch, matmul_precision("highest"):
        with write_errors(scratch, "set TMPDIR to another folder"):
            hidden = HiddenStates(scratch, reference.shape, rows)
            hidden.start(stack.embedder(rows))
            through_layers([(hidden, stack, stack.read_layer)], on_step)
        norm, head = stack.head()
        for number, row in enumerate(rows.tolist()):
            states = norm(hidden.read(layers, slice(number, number + 1)).to(device))[0]
            session = open_session(1, len(row))
            for first in range(0, len(row) - 1, POSITIONS):
                ids = row[first : min(first + POSITIONS, len(row) - 1)]
                logits = as_tensor(session.last_logits([ids], [len(ids)])).to(device)
                exact = stack.logit_chunks(head, states[first : first + len(ids)])
                targets = torch.tensor(row[first + 1 : first + 1 + len(ids)], device=device)
                parts.append(compare(_beside(exact, logits), targets))
            on_step()
    return require_finite(join(parts), "the model as it runs, or of its original,")


def _beside(chunks: Iterator[Tensor], logits: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Each chunk of the vocabulary, paired with the same entries of `logits` [n, V]."""
    first = 0
    for chunk in chunks:
        yield chunk, logits[:, first : first + chunk.shape[1]].float()
        first += chunk.shape[1]
