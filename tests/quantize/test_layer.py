"""What the information of a layer's outputs decides when the layer is quantized."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from gemma_awq_cli.awq.gram import output_error
from gemma_awq_cli.awq.search import BEST
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward.layerwise import TextStack
from gemma_awq_cli.quantize.input_statistics import Observer
from gemma_awq_cli.quantize.layer import dense_weights, quantize_layer
from tests.conftest import tiny_rows

CPU, GROUP = torch.device("cpu"), 32


@torch.inference_mode()
def test_the_linears_whose_outputs_matter_decide_the_scale_that_all_share(
    checkpoints: Callable[[str], Path], text_file: Path
) -> None:
    folder = checkpoints("gemma3")
    stack = TextStack(Checkpoint(folder), CPU)
    layout, weights = stack.checkpoint.shape.layouts[0], stack.read_layer(0)
    rows = tiny_rows(folder, text_file).ids
    module = stack.layer(0, weights)
    observer = Observer(layout, module, GROUP, 8192, CPU)
    stack.run_layer(0, module, stack.embedder(rows)(rows))
    observer.finish(0)
    observed = list(observer.hand_over())
    group = next(group for group, _ in observed if len(group.linears) == 3)
    gram = next(statistics.gram.clone() for one, statistics in observed if one is group)
    effort = BEST._replace(correction=0.0)

    def errors(decisive: str) -> dict[str, float]:
        """Of each linear of the group, where the outputs of one matter a hundred thousand times as much."""
        sizes = {name: layout.linears[name].outputs for name in group.linears}
        known: dict[str, list[Tensor]] = {
            group.name: [torch.eye(size) * (1e5 if name == decisive else 1.0) for name, size in sizes.items()]
        }
        made = quantize_layer(
            layout, stack.checkpoint.family.gain_offset, weights, iter(observed), GROUP, CPU, effort, known
        )
        assert "row feedback" in next(record.method for record in made.groups if record.name == group.name)
        dense = dense_weights(made.tensors, layout, CPU)
        columns = made.columns[decisive]
        return {
            name: output_error(dense[f"{name}.weight"] / columns - weights[f"{name}.weight"].float(), gram)
            for name in group.linears
        }

    found = {name: errors(name) for name in group.linears if "v_proj" not in name}  # whose rows are scaled too
    for name, own in found.items():
        assert own[name] < min(other[name] for decisive, other in found.items() if decisive != name)
