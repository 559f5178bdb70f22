"""One decoder layer to 4 bits: search a scale a group, round, decide, fold, and prove the fold.

Every decision is taken per group of linears that share an input, on the calibration rows' Gram matrix, and a group
whose result would be worse than plain round-to-nearest gets plain round-to-nearest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gemma_awq_cli.awq.error_propagation import correct
from gemma_awq_cli.awq.fold import fold_into_norm, repeat_heads, tie_heads
from gemma_awq_cli.awq.gptq import residuals
from gemma_awq_cli.awq.gram import InputStatistics
from gemma_awq_cli.awq.grid import dequantize
from gemma_awq_cli.awq.packing import PackedWeight, pack_weight, unpack_weight
from gemma_awq_cli.awq.precision import matmul_precision
from gemma_awq_cli.awq.round_group import Rounded, round_compensated, round_nearest, rounding_error
from gemma_awq_cli.awq.search import BALANCED, Effort, search_scale
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.gemma.families import Family, ScaleGroup

FOLD_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Heads:
    """The attention's shape, as folding v into o needs it."""

    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: Any) -> "Heads":
        heads = int(config.num_attention_heads)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(heads, int(config.num_key_value_heads), int(head_dim))


@dataclass(frozen=True)
class GroupReport:
    """What was decided for one group. Errors: mean squared output error over the calibration rows, summed; where the
    weights were corrected for the layers before, that of rounding the corrected ones.
    """

    name: str
    linears: tuple[str, ...]
    method: str
    exponents: tuple[float, float]
    error: float
    rtn_error: float
    gram_block: int


@dataclass
class QuantizedLayer:
    """tensors: what is written, by names relative to the layer; groups: the decisions, in the family's order.

    columns, rows: what each linear's weight was multiplied by before it was rounded, [K] and [N, 1] float32.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    groups: list[GroupReport] = field(default_factory=list)
    columns: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)


def folded_weights(layer: QuantizedLayer, weights: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """float32 weights of the folded but unquantized layer; what is not a linear as it is stored."""
    folded = _unquantized(layer, device)
    for name, columns in layer.columns.items():
        weight = weights[f"{name}.weight"].to(device, torch.float32, copy=True)
        folded[f"{name}.weight"] = weight.mul_(columns).mul_(layer.rows[name])
    return folded


def dense_weights(layer: QuantizedLayer, device: torch.device) -> dict[str, Tensor]:
    """float32 weights that compute what the packed layer computes, from the tensors that are written."""
    dense = _unquantized(layer, device)
    for name in layer.columns:
        packed = PackedWeight(*(layer.tensors[f"{name}.{kind}"].to(device) for kind in PackedWeight._fields))
        dense[f"{name}.weight"] = dequantize(*unpack_weight(packed))
    return dense


def _unquantized(layer: QuantizedLayer, device: torch.device) -> dict[str, Tensor]:
    return {n: t.to(device, torch.float32) for n, t in layer.tensors.items() if n.endswith(".weight")}


def quantize_layer(
    family: Family,
    weights: Mapping[str, Tensor],
    statistics: dict[str, InputStatistics],
    heads: Heads,
    group_size: int,
    device: torch.device,
    effort: Effort = BALANCED,
) -> QuantizedLayer:
    """Quantize one layer. weights: all of its parameters in the dtype that stays 16-bit, by name.

    The statistics are taken out of their dict as they are used up: a Gram matrix is as large as a weight.
    """
    layer = QuantizedLayer()
    layer.tensors.update({n: w for n, w in weights.items() if not _is_linear(family, n)})
    # Backwards, so that what a linear's rows take up (v for o, up for down) is decided before the linear is rounded.
    for group in reversed(family.groups):
        own = statistics.pop(group.name)
        stacked = _stacked(weights, group.linears, device)
        if own.drift is not None:
            correct(stacked, own.drift, own.gram, effort.correction)
            own.drift = None
        sizes = [weights[f"{n}.weight"].shape[0] for n in group.linears]
        originals = dict(zip(group.linears, stacked.split(sizes), strict=True))
        rows, ones = _rows(layer, originals), torch.ones(stacked.shape[1], device=device)
        realise, shared = _realiser(family, group, weights, heads, device), _shared(group, heads, device)
        choice = search_scale(
            list(originals.values()), own.mean_abs, residuals(own.gram), group_size, realise, shared, effort
        )
        method = "descended scale+compensation" if choice.descended else "scale+compensation"
        exponents = choice.exponents
        scale = _take_up(layer, family, group, choice.scale, weights, heads)
        result = round_compensated(stacked, scale, rows, own.gram, group_size, effort)
        plain = round_nearest(stacked, ones, torch.ones_like(rows), group_size)
        with matmul_precision("medium"):  # they are only compared
            error = rounding_error(stacked, scale, rows, result, own.gram)
            rtn_error = rounding_error(stacked, ones, torch.ones_like(rows), plain, own.gram)
        del plain
        if not error <= rtn_error:  # also when it is NaN
            method, exponents, error = "round-to-nearest", (0.0, 0.0), rtn_error
            scale = _take_up(layer, family, group, ones, weights, heads)
            result = round_nearest(stacked, scale, rows, group_size)
        _keep(layer, originals, scale, rows, result)
        layer.groups.insert(
            0, GroupReport(group.name, group.linears, method, exponents, error, rtn_error, own.gram.shape[1])
        )
    return layer


def _stacked(weights: Mapping[str, Tensor], linears: Sequence[str], device: torch.device) -> Tensor:
    """The group's weights under each other: [N, K] float32."""
    parts = [weights[f"{name}.weight"] for name in linears]
    stacked = torch.empty(sum(p.shape[0] for p in parts), parts[0].shape[1], device=device)
    start = 0
    for part in parts:
        stacked[start : start + part.shape[0]] = part.to(device)
        start += part.shape[0]
    return stacked


def _rows(layer: QuantizedLayer, originals: Mapping[str, Tensor]) -> Tensor:
    """What the stacked rows of a group's linears are multiplied by, as decided so far: [N, 1]."""
    ones = torch.ones(1, 1)
    return torch.cat([layer.rows.get(n, ones.to(w.device)).expand(w.shape[0], 1) for n, w in originals.items()])


def _keep(
    layer: QuantizedLayer, originals: Mapping[str, Tensor], columns: Tensor, rows: Tensor, result: Rounded
) -> None:
    """Put a group's linears into the layer."""
    start = 0
    for name, weight in originals.items():
        own = slice(start, start + weight.shape[0])
        start = own.stop
        layer.columns[name], layer.rows[name] = columns, rows[own]
        for kind, tensor in pack_weight(*result.rows(own))._asdict().items():
            layer.tensors[f"{name}.{kind}"] = tensor.cpu()


def _is_linear(family: Family, name: str) -> bool:
    return any(name == f"{linear}.weight" for group in family.groups for linear in group.linears)


def _realiser(
    family: Family, group: ScaleGroup, weights: Mapping[str, Tensor], heads: Heads, device: torch.device
) -> Any:
    """The function that turns a wanted scale [K] into the one that the group's source can take up exactly."""
    if group.fold == "norm":
        norm = weights[f"{group.source}.weight"].to(device)
        return lambda scale: fold_into_norm(norm, scale, family.gain_offset)[1]
    if group.fold == "heads":
        return lambda scale: repeat_heads(tie_heads(scale, heads.kv_heads, heads.head_dim), heads.heads, heads.head_dim)
    return lambda scale: scale


def _shared(group: ScaleGroup, heads: Heads, device: torch.device) -> Tensor | None:
    """Which columns of a group must get the same scale: see `search_scale`."""
    if group.fold != "heads":
        return None
    channels = torch.arange(heads.kv_heads * heads.head_dim, device=device)
    return repeat_heads(channels, heads.heads, heads.head_dim)


def _take_up(
    layer: QuantizedLayer,
    family: Family,
    group: ScaleGroup,
    scale: Tensor,
    weights: Mapping[str, Tensor],
    heads: Heads,
) -> Tensor:
    """Give the inverse of a group's scale to what feeds it. Returns the scale that makes this exact."""
    if group.fold == "norm":
        name = f"{group.source}.weight"
        folded, scale = fold_into_norm(weights[name].to(scale.device), scale, family.gain_offset)
        layer.tensors[name] = folded.cpu()
    elif group.fold == "heads":
        layer.rows[group.source] = tie_heads(scale, heads.kv_heads, heads.head_dim).reciprocal()[:, None]
    else:
        layer.rows[group.source] = scale.reciprocal()[:, None]
    return scale


def fold_deviation(original: Tensor, folded: Tensor, hidden: Tensor) -> float:
    """How far a folded layer's output is from the original's, relative to what the layer adds to `hidden`."""
    contribution = (original - hidden).norm().clamp(min=torch.finfo(torch.float32).tiny)
    return float((folded - original).norm() / contribution)


def require_exact_fold(index: int, deviation: float) -> None:
    """Stop before anything wrong is written: an inexact fold is a bug, never a matter of taste."""
    if not deviation <= FOLD_TOLERANCE:
        raise GemmaAwqError(
            f"Layer {index}: folding its scales changed its output by {deviation:.1e} (at most {FOLD_TOLERANCE:.0e}).",
            "This is a bug or an unknown kind of Gemma: please report it with the model's name. Nothing was written.",
        )
