"""An artifact with some groups of linears back in 16 bits.

Its norms and its other linears stay as they are: a linear's 16-bit weights are multiplied by what the layer's folds ask
of it, and rounded once to the 16-bit data type. So no layer is quantized again.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from gemma_awq_cli.fidelity.metrics import Fidelity
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.writing import TensorWriter
from gemma_awq_cli.models.forward.hidden_states import HiddenStates
from gemma_awq_cli.models.forward.memory import return_freed_memory
from gemma_awq_cli.quantize.fold_files import FoldFiles
from gemma_awq_cli.quantize.heldout import measure_heldout
from gemma_awq_cli.quantize.layer_pass import layer_memory_errors, pass_heldout
from gemma_awq_cli.quantize.preparation import Prepared


class Mixture:
    """The layers of a finished artifact with the groups in `prepared.plan.left` in 16 bits."""

    def __init__(self, prepared: Prepared, artifact: Path, folds: FoldFiles) -> None:
        self.prepared = prepared
        self._artifact, self._folds = Checkpoint(artifact), folds

    def layers(self) -> Iterator[dict[str, Tensor]]:
        """Yield the tensors of each layer, by their names relative to the layer."""
        return (self._layer(index) for index in range(self.prepared.plan.layers))

    def measure(self, folder: Path, on_layer: Callable[[], None]) -> Fidelity:
        """Compare the predictions with the 16-bit model's on the held-out rows, as the report has it.

        folder: for the hidden states. Nothing of the artifact is written.
        """
        prepared, plan = self.prepared, self.prepared.plan
        rows = prepared.rows
        hidden = HiddenStates(folder, prepared.checkpoint.shape, rows.ids[:0], rows.heldout)
        hidden.start(prepared.stack.embedder(rows.heldout))
        for index, tensors in enumerate(self.layers()):
            with layer_memory_errors(plan, index):
                pass_heldout(prepared.stack, plan, hidden, index, tensors)
            return_freed_memory()
            on_layer()
        with layer_memory_errors(plan, plan.layers):
            return measure_heldout(prepared.stack, hidden, rows.heldout)

    def write(self, writer: TensorWriter) -> None:
        """Write the tensors of all layers."""
        key = self.prepared.checkpoint.artifact_key
        for index, tensors in enumerate(self.layers()):
            for name, tensor in tensors.items():
                writer.write(key(f"model.layers.{index}.{name}"), tensor)

    def _layer(self, index: int) -> dict[str, Tensor]:
        prefix, layout = f"model.layers.{index}.", self.prepared.plan.layouts[index]
        left = [name for group in self.prepared.plan.left if group.layer == index for name in group.linears]
        packed = {name: one for name, one in self._artifact.packed(index).items() if name not in left}
        found = self._artifact.read_packed({prefix + name: one for name, one in packed.items()})
        tensors = {
            f"{name.removeprefix(prefix)}.{kind}": tensor
            for name, weight in found.items()
            for kind, tensor in weight._asdict().items()
        }
        rest = [name for name in self.prepared.stack.layer_names(index) if name not in layout.unpacked()]
        tensors |= {name: self._artifact.read([prefix + name])[prefix + name] for name in rest}
        return tensors | self._left_weights(index, left)

    def _left_weights(self, index: int, left: list[str]) -> dict[str, Tensor]:
        if not left:
            return {}
        prepared, prefix = self.prepared, f"model.layers.{index}."
        factors = self._folds.read(index, prepared.plan.layouts[index])
        read = prepared.checkpoint.read(f"{prefix}{name}.weight" for name in left)
        weights = {}
        for name in left:
            weight = read[f"{prefix}{name}.weight"].to(prepared.plan.dtype).to(torch.float32)
            folded = weight * factors[name].columns * factors[name].rows
            weights[f"{name}.weight"] = folded.to(prepared.plan.dtype)
        return weights
