"""Two checkpoints compared on a text: both models' layers side by side, one layer in memory at a time.

Everything is computed from the stored weights in float32. The hidden states between the layers lie in files, and logits
are computed a few vocabulary entries at a time, so that a large model needs no more memory here than for quantizing.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from gemma_awq_cli.awq.grid import dequantize
from gemma_awq_cli.awq.packing import PackedWeight, unpack_weight
from gemma_awq_cli.awq.precision import matmul_precision
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.fidelity.metrics import Positions, compare, join
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.staging import write_errors
from gemma_awq_cli.models.forward.hidden_states import HiddenStates
from gemma_awq_cli.models.forward.layerwise import TextStack
from gemma_awq_cli.system.saving import scratch_folder

HEAD_TOKENS = 2048  # positions whose logits are compared at a time


def comparison_steps(rows: Tensor, layers: int) -> int:
    """Return how often `measure` calls `on_step`."""
    return 2 * layers + len(_batches(rows))


@torch.inference_mode()
def measure(
    artifact: Checkpoint,
    reference: Checkpoint,
    rows: Tensor,
    device: torch.device,
    on_step: Callable[[], None],
    precision: str = "highest",
) -> Positions:
    """Compare the predictions of every next token of `rows` [R, S].

    precision: of float32 matrix products, as `torch.set_float32_matmul_precision` names it.
    """
    stack = TextStack(reference, device)
    other = ComparedStack(artifact, stack)
    layers = reference.layers
    with scratch_folder() as scratch, matmul_precision(precision):
        sides = []
        with write_errors(scratch, "set TMPDIR to another folder"):
            for name, embed in (("reference", stack.embedder(rows)), ("other", other.stack.embedder(rows))):
                folder = scratch / name
                folder.mkdir()
                hidden = HiddenStates(folder, reference.shape, rows)
                hidden.start(embed)
                sides.append(hidden)
            through_layers([(sides[0], stack, stack.read_layer), (sides[1], other.stack, other.read_layer)], on_step)
        parts = []
        heads = (stack.head(), other.stack.head())
        for batch in _batches(rows):
            chunks = []
            for hidden, (norm, head) in zip(sides, heads, strict=True):
                states = norm(hidden.read(layers, batch).to(device))[:, :-1]
                chunks.append(stack.logit_chunks(head, states.reshape(-1, states.shape[-1])))
            targets = rows[batch, 1:].reshape(-1).to(device)
            parts.append(compare(zip(*chunks, strict=True), targets))
            on_step()
    return require_finite(join(parts), f"{artifact.folder} or {reference.folder}")


def through_layers(
    sides: Sequence[tuple[HiddenStates, TextStack, Callable[[int], Mapping[str, Tensor]]]], on_step: Callable[[], None]
) -> None:
    """Take the hidden states of several models side by side from the embedding to the last layer's output.

    sides: for each model its hidden states, its stack, and the function that reads the weights of one of its layers.
    """
    for index in range(sides[0][1].checkpoint.layers):
        for hidden, stack, read in sides:
            module = stack.layer(index, dict(read(index)))
            hidden.advance(index, hidden.calibration, 1, partial(stack.run_layer, index, module))
            on_step()


def require_finite(positions: Positions, whose: str) -> Positions:
    """Return `positions`, or raise an error if the predictions of one of the models were NaN or infinite."""
    if not torch.isfinite(positions.kl).all() or not torch.isfinite(positions.log_quantized).all():
        raise GemmaAwqError(
            f"The predictions of {whose} are NaN or infinite.",
            "The weights are damaged or belong to another model, or the data type is too narrow for this one.",
        )
    return positions


def _batches(rows: Tensor) -> Sequence[slice]:
    size = max(1, HEAD_TOKENS // rows.shape[1])
    return [slice(first, min(first + size, len(rows))) for first in range(0, len(rows), size)]


class ComparedStack:
    """The weights of a second checkpoint of the model that `stack` was built for, read one layer at a time.

    The linears of an artifact are dequantized to float32; 16-bit weights are read as they are.
    """

    def __init__(self, checkpoint: Checkpoint, stack: TextStack) -> None:
        self.checkpoint = checkpoint
        self.stack = stack.reading(checkpoint)  # of the unquantized tensors

    def read_layer(self, index: int) -> dict[str, Tensor]:
        """Return the weights of one layer, by their names relative to the layer."""
        if not (packed := self.checkpoint.packed(index)):
            return self.stack.read_layer(index)
        prefix, layout = f"model.layers.{index}.", self.checkpoint.shape.layouts[index]
        places, shapes = layout.places(), layout.unpacked()
        device = self.stack.device
        dense = {places[name].tensor: torch.empty(shapes[places[name].tensor], device=device) for name in packed}
        for name, weight in self.checkpoint.read_packed({prefix + name: one for name, one in packed.items()}).items():
            tensor, part = places[name.removeprefix(prefix)]
            dense[tensor][part] = dequantize(*unpack_weight(PackedWeight(*(one.to(device) for one in weight))))
        rest = [name for name in self.stack.layer_names(index) if name not in dense]
        read = self.checkpoint.read(prefix + name for name in rest)
        return dense | {name: read[prefix + name] for name in rest}
