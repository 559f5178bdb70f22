"""The layer-by-layer model is transformers' model: same logits, for rows longer than the sliding window."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward import layerwise
from gemma_awq_cli.models.forward.layerwise import (
    KeysAndValues,
    TextStack,
    meta_model,
    real_module,
    record_calls,
    require_known_matrices,
)
from gemma_awq_cli.models.forward.per_layer_inputs import PerLayerInputs
from tests.conftest import FORWARDS
from tests.tiny import edit_weights, original_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", FORWARDS)
@torch.inference_mode()
def test_logits_equal_transformers(kind: str, checkpoints: Callable[[str], Path]) -> None:
    folder = checkpoints(kind)
    ids = torch.randint(6, 260, (2, 48), generator=torch.Generator().manual_seed(0))
    expected = original_model(folder, dtype=torch.float32)(input_ids=ids).logits

    stack = TextStack(Checkpoint(folder), torch.device("cpu"))
    hidden = stack.embedder(ids)(ids)
    shared: KeysAndValues = {}
    for index in range(stack.checkpoint.layers):
        hidden = stack.run_layer(index, stack.layer(index, stack.read_layer(index)), hidden, ids, shared)
    norm, head = stack.head()
    logits = torch.cat(list(stack.logit_chunks(head, norm(hidden).flatten(0, 1), chunk=100)), -1)
    torch.testing.assert_close(logits.view_as(expected), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["gemma3n_text", "gemma4_text"])
@torch.inference_mode()
def test_per_layer_inputs_equal_transformers(kind: str, checkpoints: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint(checkpoints(kind))
    per_layer = checkpoint.shape.per_layer
    assert per_layer is not None
    ids = torch.arange(2 * 132).view(2, 132) % checkpoint.vocabulary
    assert (int(ids.max()) >= per_layer.vocabulary) == (kind == "gemma3n_text")  # some are not in the table
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32).model
    embedded = model.embed_tokens(ids)
    expected = model.project_per_layer_inputs(embedded, model.get_per_layer_inputs(ids))
    ours = PerLayerInputs(checkpoint)
    for index in range(checkpoint.layers):
        torch.testing.assert_close(ours.of_layer(index, ids, CPU), expected[:, :, index], rtol=1e-5, atol=1e-5)


class Layer(nn.Module):
    """A layer with a stored buffer, called with a positional input of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, bias=False)
        self.register_buffer("layer_scalar", torch.ones(1))
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))

    def forward(self, hidden: Tensor, own: Tensor, scale: float) -> Tensor:
        return (self.linear(hidden) + own) * self.layer_scalar * scale


class Rotary(nn.Module):
    def __init__(self, _: object) -> None:
        super().__init__()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.norm = nn.LayerNorm(4)
        self.rotary_emb = Rotary(None)

    def forward(self, inputs_embeds: Tensor, use_cache: bool) -> Tensor:
        assert not use_cache
        for index, layer in enumerate(self.layers):
            inputs_embeds = layer(inputs_embeds, torch.full(inputs_embeds.shape, float(index)), scale=2.0 + index)
        return self.norm(inputs_embeds)


def test_positional_inputs_of_a_layer_are_recorded() -> None:
    with torch.device("meta"):
        model = Model()
    before = list(model.layers)
    calls = record_calls(model, SimpleNamespace(hidden_size=4), 3, CPU)
    assert [(float(call.positional[0].mean()), call.named) for call in calls] == [
        (0.0, {"scale": 2.0}), (1.0, {"scale": 3.0}),
    ]  # fmt: skip
    assert calls[0].positional[0].shape == (1, 3, 4)
    assert list(model.layers) == before


def test_stored_buffers_are_weights_too() -> None:
    with torch.device("meta"):
        layer = Layer()
    weights = {
        "linear.weight": torch.eye(4, dtype=torch.bfloat16),
        "layer_scalar": torch.tensor([3.0], dtype=torch.bfloat16),
        "count": torch.tensor([5]),
    }
    made = real_module(layer, weights, CPU)
    assert made.count.dtype == torch.int64
    assert torch.equal(made(torch.ones(1, 4), torch.ones(1, 4), scale=2.0), torch.full((1, 4), 12.0))
    layer.register_buffer("table", torch.ones(2, device="meta"), persistent=False)
    with pytest.raises(GemmaAwqError, match="computes the buffer table of Layer"):
        real_module(layer, weights, CPU)


def test_a_buffer_of_a_layer_is_read_from_the_checkpoint(
    tmp_path: Path, checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "model.layers.1.layer_scalar"
    folder = shutil.copytree(checkpoints("gemma3_text"), tmp_path / "tiny")
    edit_weights(folder, lambda tensors: tensors.update({name: torch.tensor([0.5], dtype=torch.bfloat16)}))

    def with_buffer(config: object) -> nn.Module:
        model = meta_model(config)
        model.model.layers[1].register_buffer("layer_scalar", torch.ones(1, device="meta"))
        return model

    monkeypatch.setattr(layerwise, "meta_model", with_buffer)
    stack = TextStack(Checkpoint(folder), CPU)
    assert stack.shapes[name] == (1,)
    assert "layer_scalar" not in stack.layer_names(0)
    weights = stack.read_layer(1)
    assert float(weights["layer_scalar"]) == 0.5
    assert float(stack.layer(1, weights).layer_scalar) == 0.5


def test_experts_do_not_silently_stay_16_bit(checkpoints: Callable[[str], Path]) -> None:
    stack = TextStack(Checkpoint(checkpoints("gemma2")), CPU)
    layouts = stack.checkpoint.shape.layouts
    for name, shape in (("experts.gate_up_proj", (4, 16, 8)), ("router.proj.weight", (4, 8))):
        full = f"model.layers.2.{name}"
        with pytest.raises(GemmaAwqError, match=f"{re.escape(full)} has shape .* would stay in 16 bits"):
            require_known_matrices({**stack.shapes, full: shape}, layouts)
