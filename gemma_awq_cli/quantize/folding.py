"""Folding a group's scale into the module that feeds the group, and the proof that the layer still computes the same.

A group's linears are multiplied by a scale, column by column. Its inverse goes into a norm (`norm`), into the rows of
v_proj, one scale per kv-head channel (`heads`), or into the rows of a linear whose output is multiplied into the input
(`rows`). With `none` the group gets no scale.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from gemma_awq_cli.awq.fold import fold_into_norm, repeat_heads, tie_heads
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.gemma.family import ScaleGroup
from gemma_awq_cli.models.gemma.layers import LayerLayout

FOLD_TOLERANCE = 1e-4


def foldable_scale(
    layout: LayerLayout, group: ScaleGroup, weights: Mapping[str, Tensor], gain_offset: float, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """Return a function from a scale [K] to the nearest one that can be folded exactly.

    weights: the layer's, by name; gain_offset: of the family's norms.
    """
    if group.fold == "norm":
        norm = weights[f"{group.source}.weight"].to(device)
        return lambda scale: fold_into_norm(norm, scale, gain_offset)[1]
    if group.fold == "heads":
        return lambda scale: repeat_heads(
            tie_heads(scale, layout.kv_heads, layout.head_dim), layout.heads, layout.head_dim
        )
    return lambda scale: scale


def tied_columns(layout: LayerLayout, group: ScaleGroup, device: torch.device) -> Tensor | None:
    """Return which columns of a group must get the same scale, as `search_scale` takes it: [K] integers, or None."""
    if group.fold != "heads":
        return None
    channels = torch.arange(layout.kv_size, device=device)
    return repeat_heads(channels, layout.heads, layout.head_dim)


def fold_norm(
    group: ScaleGroup, scale: Tensor, weights: Mapping[str, Tensor], gain_offset: float
) -> tuple[Tensor, Tensor]:
    """Fold the inverse of a scale [K] into a group's norm.

    Returns the norm's new weight [K] in its stored dtype, and the scale of the linears that makes the fold exact.
    """
    return fold_into_norm(weights[f"{group.source}.weight"].to(scale.device), scale, gain_offset)


def source_rows(layout: LayerLayout, group: ScaleGroup, scale: Tensor) -> Tensor:
    """Return the factors [N, 1] of the rows of a group's source, a linear, that fold the inverse of a scale [K]."""
    if group.fold == "heads":
        scale = tie_heads(scale, layout.kv_heads, layout.head_dim)
    return scale.reciprocal()[:, None]


def fold_deviation(original: Tensor, folded: Tensor, carried: Tensor) -> float:
    """Return how far a folded layer's output is from the original's, relative to what attention and MLP add to it.

    carried: the output without what they add (`TextStack.carried`).
    """
    contribution = (original - carried).norm().clamp(min=torch.finfo(torch.float32).tiny)
    return float((folded - original).norm() / contribution)


def require_exact_fold(index: int, deviation: float) -> None:
    """Raise, before anything of layer `index` is written, if its folds are not exact: that is always a bug."""
    if not deviation <= FOLD_TOLERANCE:  # also if it is NaN
        raise GemmaAwqError(
            f"Layer {index + 1}: folding its scales changed its output by {deviation:.1e}, more than the "
            f"{FOLD_TOLERANCE:.0e} that rounding explains.",
            "This is a bug or an unknown kind of Gemma. Please report it with the model's name.",
        )
