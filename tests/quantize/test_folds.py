"""Folding proved on whole layers: every fold of every family passes the check, and each known wrong fold fails it.

The wrong folds are those that shipped elsewhere: a gain taken for plain `weight`, a bf16 weight rounded after the scale
was chosen, and a GQA scale tiled instead of repeated.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gemma_awq_cli.awq.fold import fold_into_norm, repeat_heads, tie_heads
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward.layerwise import TextStack
from gemma_awq_cli.models.gemma.family import ScaleGroup
from gemma_awq_cli.models.gemma.layers import layers_of
from gemma_awq_cli.quantize.folding import FOLD_TOLERANCE, fold_deviation, require_exact_fold
from tests.conftest import FAMILIES

CPU = torch.device("cpu")


class FoldedLayer:
    """Layer 1 of a tiny model (random weights, hard gains), its input, and folds of a random scale into it."""

    def __init__(self, folder: Path) -> None:
        self.checkpoint = Checkpoint(folder)
        self.stack = TextStack(self.checkpoint, CPU)
        self.weights = self.stack.read_layer(1)
        self.layout = layers_of(self.checkpoint.facts, self.checkpoint.family)[1]
        torch.manual_seed(5)
        self.hidden = torch.randn(2, 40, int(self.stack.config.hidden_size))
        self.original = self.run(self.weights)

    def run(self, weights: dict[str, Tensor]) -> Tensor:
        return self.stack.run_layer(1, self.stack.layer(1, weights), self.hidden)

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
            gain_offset = self.checkpoint.family.gain_offset if offset is None else offset
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
        return fold_deviation(self.original, self.run(weights), self.hidden)


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_fold_of_every_family_is_exact(kind: str, checkpoints: Callable[[str], Path]) -> None:
    layer = FoldedLayer(checkpoints(kind))
    for group in layer.checkpoint.family.groups:
        deviation = layer.fold(group)
        require_exact_fold(1, deviation)
        assert deviation > 0, f"{group.name}: nothing was folded"


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_plain_weight_fold_fails_the_check(kind: str, checkpoints: Callable[[str], Path]) -> None:
    layer = FoldedLayer(checkpoints(kind))
    norms = [group for group in layer.checkpoint.family.groups if group.fold == "norm"]
    assert norms
    for group in norms:
        with pytest.raises(GemmaAwqError, match="changed its output"):
            require_exact_fold(1, layer.fold(group, offset=0.0))


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_unsnapped_fold_fails_the_check(kind: str, checkpoints: Callable[[str], Path]) -> None:
    layer = FoldedLayer(checkpoints(kind))
    norms = [group for group in layer.checkpoint.family.groups if group.fold == "norm"]
    assert norms
    for group in norms:
        assert layer.fold(group, snap=False) > FOLD_TOLERANCE


@pytest.mark.parametrize("kind", ["gemma", "gemma2", "gemma3_text", "gemma3"])  # two kv heads: tiling differs
def test_a_tiled_gqa_scale_fails_the_check(kind: str, checkpoints: Callable[[str], Path]) -> None:
    layer = FoldedLayer(checkpoints(kind))
    group = next(g for g in layer.checkpoint.family.groups if g.fold == "heads")
    assert layer.fold(group, tile=True) > FOLD_TOLERANCE


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
