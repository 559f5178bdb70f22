"""The layers as data, against transformers' own modules."""

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward.layerwise import meta_model
from gemma_awq_cli.models.gemma.families import FAMILIES
from gemma_awq_cli.models.gemma.layers import SLIDING, layers_of


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_layer_is_transformers_own(family: str, checkpoints: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint(checkpoints(family))
    model = meta_model(checkpoint.text_config)
    layouts = layers_of(checkpoint.facts, checkpoint.family)
    assert len(layouts) == len(model.model.layers) == checkpoint.layers
    for layout, layer in zip(layouts, model.model.layers, strict=True):
        modules = dict(layer.named_modules())
        linears = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
        assert {name: (one.outputs, one.inputs, one.bias) for name, one in layout.linears.items()} == {
            name: (module.out_features, module.in_features, module.bias is not None) for name, module in linears.items()
        }
        norms = {name: module.weight.numel() for name, module in modules.items() if hasattr(module, "eps")}
        assert {norm.name: norm.size for norm in layout.norms.values()} == norms
        assert {name for group in layout.groups for name in group.linears} == set(linears)
        attention = layer.self_attn
        assert (layout.head_dim, layout.heads // layout.kv_heads) == (
            attention.head_dim, attention.num_key_value_groups
        )  # fmt: skip
        window = getattr(attention, "sliding_window", None)
        assert layout.window == window
        assert (layout.kind == SLIDING) == (window is not None)
