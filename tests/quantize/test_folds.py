"""Folding proved on whole layers: every fold of every family passes the check, and each known wrong fold fails it.

The wrong folds are those that shipped elsewhere: a gain taken for plain `weight`, a bf16 weight rounded after the scale
was chosen, and a GQA scale tiled instead of repeated.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gemma_awq_cli.awq.fold import fold_into_norm, repeat_heads, tie_heads
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward.layerwise import TextStack
from gemma_awq_cli.models.gemma.family import ScaleGroup
from gemma_awq_cli.quantize.folding import FOLD_TOLERANCE, fold_deviation, require_exact_fold
from tests.conftest import FAMILIES

CPU = torch.device("cpu")


class FoldedLayer:
    """One layer of a tiny model (random weights, hard gains), its input, and folds of a random scale into it."""

    def __init__(self, stack: TextStack, index: int) -> None:
        self.stack, self.index, self.family = stack, index, stack.checkpoint.family
        self.weights = stack.read_layer(index)
        self.layout = stack.checkpoint.shape.layouts[index]
        torch.manual_seed(5)
        altup = stack.checkpoint.shape.altup
        streams = () if altup is None else (altup.streams,)
        self.hidden = torch.randn(2, *streams, 40, self.layout.hidden)
        self.ids = torch.randint(6, 260, (2, 40))
        keys_and_values = torch.randn(2, 2, self.layout.kv_heads, 40, self.layout.head_dim)
        self.shared = {} if self.layout.kv_source is None else {self.layout.kv_source: tuple(keys_and_values)}
        module = stack.layer(index, self.weights)
        self.original = self.run(self.weights)
        self.carried = stack.carried(index, module, self.hidden)

    def run(self, weights: dict[str, Tensor]) -> Tensor:
        module = self.stack.layer(self.index, weights)
        return self.stack.run_layer(self.index, module, self.hidden, self.ids, self.shared)

    def groups(self, *folds: str) -> list[ScaleGroup]:
        """The layer's groups that are folded in one of these ways."""
        return [group for group in self.layout.groups if group.fold in folds]

    def scale(self, group: ScaleGroup) -> Tensor:
        """A random scale from 0.2 to 5 for a group's input channels; tied over query heads where the fold needs it."""
        torch.manual_seed(len(group.name))
        width = self.weights[f"{group.linears[0]}.weight"].shape[1]
        scale = torch.exp(torch.rand(width) * 3.2 - 1.6)
        if group.fold == "heads":
            scale = repeat_heads(
                tie_heads(scale, self.layout.kv_heads, self.layout.head_dim), self.layout.heads, self.layout.head_dim
            )
        return scale

    def fold(self, group: ScaleGroup, *, offset: float | None = None, snap: bool = True, tile: bool = False) -> float:
        """Fold one group and return the layer's deviation. The keyword arguments make it wrong."""
        weights = {name: tensor.float() for name, tensor in self.weights.items()}
        scale = self.scale(group)
        if group.fold == "norm":
            norm = self.weights[f"{group.source}.weight"]
            gain_offset = self.family.gain_offset if offset is None else offset
            folded, exact = fold_into_norm(norm, scale, gain_offset)
            weights[f"{group.source}.weight"] = folded.float()
            scale = exact if snap else torch.where(exact == 1, exact, scale)
        else:
            rows = scale
            if group.fold == "heads":
                kv_scale = tie_heads(scale, self.layout.kv_heads, self.layout.head_dim)
                rows = kv_scale
                if tile:
                    scale = kv_scale.repeat(self.layout.heads // self.layout.kv_heads)
            weights[f"{group.source}.weight"] = weights[f"{group.source}.weight"] / rows[:, None]
        for linear in group.linears:
            weights[f"{linear}.weight"] = weights[f"{linear}.weight"] * scale
        return fold_deviation(self.original, self.run(weights), self.carried)


def folded_layers(folder: Path) -> Iterator[FoldedLayer]:
    """A layer of every kind that a tiny model has."""
    stack = TextStack(Checkpoint(folder), CPU)
    layouts = stack.checkpoint.shape.layouts
    for layout in dict.fromkeys(map(id, layouts)):  # layers that are alike have one layout
        yield FoldedLayer(stack, next(index for index, one in enumerate(layouts) if id(one) == layout))


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_fold_of_every_layer_is_exact(kind: str, checkpoints: Callable[[str], Path]) -> None:
    for layer in folded_layers(checkpoints(kind)):
        for group in layer.groups("norm", "heads", "rows"):
            deviation = layer.fold(group)
            require_exact_fold(layer.index, deviation)
            assert deviation > 0, f"{group.name} of layer {layer.index}: nothing was folded"


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_gain_taken_for_another_fails_the_check(kind: str, checkpoints: Callable[[str], Path]) -> None:
    """1 + weight for weight, or the reverse."""
    for layer in folded_layers(checkpoints(kind)):
        assert layer.groups("norm")
        for group in layer.groups("norm"):
            with pytest.raises(GemmaAwqError, match="changed its output"):
                require_exact_fold(layer.index, layer.fold(group, offset=1 - layer.family.gain_offset))


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_unsnapped_fold_fails_the_check(kind: str, checkpoints: Callable[[str], Path]) -> None:
    for layer in folded_layers(checkpoints(kind)):
        for group in layer.groups("norm"):
            assert layer.fold(group, snap=False) > FOLD_TOLERANCE


@pytest.mark.parametrize("kind", ["gemma", "gemma2", "gemma3_text", "gemma3", "vaultgemma"])  # two kv heads
def test_a_tiled_gqa_scale_fails_the_check(kind: str, checkpoints: Callable[[str], Path]) -> None:
    for layer in folded_layers(checkpoints(kind)):
        (group,) = layer.groups("heads")
        assert layer.fold(group, tile=True) > FOLD_TOLERANCE


@pytest.mark.parametrize("kind", ["gemma3n_text", "gemma4_text", "gemma4-dense", "gemma4_unified_text"])
def test_a_fold_that_a_family_must_not_have_fails_the_check(kind: str, checkpoints: Callable[[str], Path]) -> None:
    """A norm follows v_proj, and Laurel adds the output of Gemma 3n's input norm itself."""
    for layer in folded_layers(checkpoints(kind)):
        wrong = []
        if "self_attn.v_proj" in layer.layout.linears:
            wrong.append(ScaleGroup("o", ("self_attn.o_proj",), "self_attn.v_proj", "heads"))
        if kind == "gemma3n_text":
            qkv = next(group.linears for group in layer.layout.groups if group.name == "qkv")
            wrong.append(ScaleGroup("qkv", qkv, "input_layernorm", "norm"))
        for group in wrong:
            with pytest.raises(GemmaAwqError, match="changed its output"):
                require_exact_fold(layer.index, layer.fold(group))


def test_what_a_layer_adds_is_seen_beside_what_it_carries(checkpoints: Callable[[str], Path]) -> None:
    """A scalar of the layer, and the prediction of streams, are no part of what attention and MLP add."""
    for kind in ("gemma4-dense", "gemma3n_text"):
        stack = TextStack(Checkpoint(checkpoints(kind)), CPU)
        layer = FoldedLayer(stack, 1)
        nothing = ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")
        if kind == "gemma3n_text":  # the streams are corrected by as much as the layer adds
            nothing = ("altup.correction_coefs.weight", "post_per_layer_input_norm.weight")
        silent = {name: tensor * (name not in nothing) for name, tensor in layer.weights.items()}
        if kind == "gemma4-dense":
            silent["layer_scalar"] = torch.tensor([0.25])
        carried = stack.carried(1, stack.layer(1, silent), layer.hidden)
        added = layer.run(silent) - carried
        if kind == "gemma4-dense":
            assert torch.equal(carried, layer.hidden * 0.25)
            torch.testing.assert_close(added, torch.zeros_like(added))
        else:  # without coefficients every stream gets the same innovation
            torch.testing.assert_close(added, added[:, :1].expand_as(added), rtol=1e-4, atol=1e-4)


def test_a_nan_deviation_fails_the_check() -> None:
    with pytest.raises(GemmaAwqError):
        require_exact_fold(0, float("nan"))


def test_norm_fold_is_exact_in_the_stored_dtype_for_every_gain() -> None:
    torch.manual_seed(0)
    gains = torch.cat([torch.randn(500), torch.tensor([0.0, 1e-3, -1e-3, 2**-8, 40.0, -40.0])])
    weight = (gains - 1).to(torch.bfloat16)
    scale = torch.exp(torch.randn(weight.numel()) * 1.5)
    folded, exact = fold_into_norm(weight, scale, 1.0)
    assert folded.dtype == torch.bfloat16
    assert torch.allclose((1 + folded.float()) * exact, 1 + weight.float(), rtol=1e-6, atol=0)
    assert (exact > 0).all(), "a scale may not turn a sign"
    zero = 1 + weight.float() == 0
    assert zero.any()
    assert torch.equal(folded[zero], weight[zero])
    assert (exact[zero] == 1).all()


def test_an_unwanted_scale_leaves_the_weight_alone() -> None:
    weight = torch.tensor([1e-9, -0.5, 3.0], dtype=torch.bfloat16)  # 1 + 1e-9 is 1 in float32
    folded, exact = fold_into_norm(weight, torch.ones(3), 1.0)
    assert torch.equal(folded, weight)
    assert torch.equal(exact, torch.ones(3))
