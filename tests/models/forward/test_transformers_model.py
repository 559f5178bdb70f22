"""transformers' model is complete: what the layouts name is packed, stored buffers are loaded as parameters are."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward import loading_dense, transformers_model
from gemma_awq_cli.models.forward.layerwise import meta_model
from gemma_awq_cli.models.forward.loading_dense import open_dense
from gemma_awq_cli.models.forward.precision import Precision
from gemma_awq_cli.models.forward.transformers_model import build_model, layer_linears
from tests.conftest import FAMILIES

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_layouts_name_every_linear_of_the_layers(kind: str, checkpoints: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint(checkpoints(kind))
    linears = {
        name: (module.out_features, module.in_features)
        for name, module in meta_model(checkpoint.text_config).named_modules()
        if isinstance(module, nn.Linear) and name.startswith("model.layers.")
    }
    kept = {
        f"model.layers.{index}.{name.removesuffix('.weight')}": shape
        for index, layout in enumerate(checkpoint.shape.layouts)
        for name, shape in layout.kept.items()
        if len(shape) == 2
    }
    packed = {name: (linear.outputs, linear.inputs) for name, linear in layer_linears(checkpoint).items()}
    assert packed | kept == linears
    assert not packed.keys() & kept.keys()


def with_buffer(monkeypatch: pytest.MonkeyPatch, stored: bool) -> None:
    """Give layer 1 a buffer, as Gemma 4's layers have, and the checkpoint its value if it is a stored one."""

    def model(config: Any) -> Any:
        made = meta_model(config)
        with torch.device("meta"):
            made.model.layers[1].register_buffer("layer_scalar", torch.zeros(1), persistent=stored)
        return made

    monkeypatch.setattr(transformers_model, "meta_model", model)
    monkeypatch.setattr(loading_dense, "meta_model", model)
    read = Checkpoint.read
    value = {"model.layers.1.layer_scalar": torch.tensor([0.5])}

    def read_with_buffer(self: Checkpoint, names: Iterable[str]) -> dict[str, Tensor]:
        names = list(names)
        found = read(self, [name for name in names if name not in value])
        return found | {name: value[name] for name in names if name in value}

    monkeypatch.setattr(Checkpoint, "read", read_with_buffer)


def opened_both_ways(folder: Path) -> list[Any]:
    checkpoint = Checkpoint(folder)
    return [build_model(checkpoint, CPU, torch.bfloat16), open_dense(checkpoint, [CPU], Precision())]


def test_stored_buffers_are_loaded_as_parameters_are(
    checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_buffer(monkeypatch, stored=True)
    for model in opened_both_ways(checkpoints("gemma3_text")):
        scalar = model.model.layers[1].layer_scalar
        assert (scalar.dtype, scalar.tolist()) == (torch.bfloat16, [0.5])


def test_a_buffer_that_nobody_computes_is_our_mistake(
    checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_buffer(monkeypatch, stored=False)
    with pytest.raises(AssertionError, match=r"never loaded: \['model.layers.1.layer_scalar'\]"):
        opened_both_ways(checkpoints("gemma3_text"))


def test_a_bias_is_not_dropped_without_a_word(
    artifacts: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(artifacts("gemma"))
    linears = {name: replace(linear, bias=True) for name, linear in checkpoint.packed(0).items()}
    monkeypatch.setattr(checkpoint, "packed", lambda _: linears)
    with pytest.raises(GemmaAwqError, match=r"model.layers.0.self_attn.q_proj of .* has a bias"):
        build_model(checkpoint, CPU, torch.bfloat16)
