"""The layers as data, against transformers' own modules."""

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward.layerwise import meta_model
from gemma_awq_cli.models.gemma.layers import SLIDING, layers_of
from tests.tiny import CONFIGS


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_every_layer_is_transformers_own(family: str, checkpoints: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint(checkpoints(family))
    model = meta_model(checkpoint.text_config)
    layouts = layers_of(checkpoint.facts, checkpoint.family)
    assert len(layouts) == len(model.model.layers) == checkpoint.layers
    for layout, layer in zip(layouts, model.model.layers, strict=True):
        modules = dict(layer.named_modules())
        kept = [name.removesuffix(".weight") for name in layout.kept]
        linears = {n: module for n, module in modules.items() if isinstance(module, nn.Linear) and n not in kept}
        assert {name: (one.outputs, one.inputs, one.bias) for name, one in layout.linears.items()} == {
            name: (module.out_features, module.in_features, module.bias is not None) for name, module in linears.items()
        }
        gains = {name: getattr(module, "weight", None) for name, module in modules.items() if hasattr(module, "eps")}
        norms = {name: gain.numel() for name, gain in gains.items() if gain is not None and name != "router"}
        assert {norm.name: norm.size for norm in layout.norms.values()} == norms
        assert {name for group in layout.groups for name in group.linears} == set(linears)
        attention = layer.self_attn
        stored = {*layout.kept, *layout.unpacked(), *(f"{name}.weight" for name in norms)}
        assert stored == set(layer.state_dict())
        assert (layout.head_dim, layout.heads // layout.kv_heads) == (
            attention.head_dim, attention.num_key_value_groups
        )  # fmt: skip
        window = getattr(attention, "sliding_window", None)
        assert layout.window == window
        assert (layout.kind == SLIDING) == (window is not None)
