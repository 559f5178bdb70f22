"""One decoder layer to 4 bits: search a scale a group, round, decide, fold, and prove the fold.

Every decision is taken per group of linears that share an input, on the calibration rows' Gram matrix, and a group
whose result would be worse than plain round-to-nearest gets plain round-to-nearest.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gemma_awq_cli.awq.fold import fold_into_norm, repeat_heads, tie_heads
from gemma_awq_cli.awq.gram import InputStatistics, block_width, output_error, scaled_gram
from gemma_awq_cli.awq.grid import Grid, dequantize, minmax_grid, nearest, quantize
from gemma_awq_cli.awq.pack import pack_weight
from gemma_awq_cli.awq.precision import matmul_precision
from gemma_awq_cli.awq.rounding import compensated
from gemma_awq_cli.awq.search import ScaleChoice, search_range, search_scale
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.families import Family, ScaleGroup

FOLD_TOLERANCE = 1e-4
GRAM_LIMIT = 16384  # inputs wider than this keep their Gram matrix in blocks


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
    """What was decided for one group. Errors: mean squared output error over the calibration rows, summed."""

    name: str
    linears: tuple[str, ...]
    method: str
    exponents: tuple[float, float]
    error: float
    rtn_error: float
    gram_block: int


@dataclass
class QuantizedLayer:
    """tensors: what is written, by names relative to the layer; dense: float32 weights that compute the same;
    folded: float32 weights of the folded but unquantized layer; groups: the decisions, in the family's order."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    dense: dict[str, Tensor] = field(default_factory=dict)
    folded: dict[str, Tensor] = field(default_factory=dict)
    groups: list[GroupReport] = field(default_factory=list)

    @property
    def error(self) -> float:
        return sum(group.error for group in self.groups)

    @property
    def rtn_error(self) -> float:
        return sum(group.rtn_error for group in self.groups)


class Observer:
    """Collects the statistics of each group's input while a layer runs."""

    def __init__(self, family: Family, module: nn.Module, group_size: int, device: torch.device) -> None:
        self.statistics: dict[str, InputStatistics] = {}
        self._hooks = []
        for group in family.groups:
            linear = module.get_submodule(group.linears[0])
            width = int(linear.in_features)  # type: ignore[arg-type]
            statistics = InputStatistics(width, block_width(width, group_size, GRAM_LIMIT), device)
            self.statistics[group.name] = statistics
            self._hooks.append(linear.register_forward_pre_hook(self._adder(statistics)))

    @staticmethod
    def _adder(statistics: InputStatistics) -> Any:
        def add(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            statistics.add(arguments[0])

        return add

    def finish(self) -> dict[str, InputStatistics]:
        """Stop observing; the means are ready."""
        for hook in self._hooks:
            hook.remove()
        for statistics in self.statistics.values():
            statistics.finish()
        return self.statistics


def quantize_layer(
    family: Family,
    weights: Mapping[str, Tensor],
    statistics: Mapping[str, InputStatistics],
    heads: Heads,
    group_size: int,
    device: torch.device,
) -> QuantizedLayer:
    """Quantize one layer. weights: all of its parameters in the dtype that stays 16-bit, by name."""
    layer = QuantizedLayer()
    layer.tensors.update({n: w for n, w in weights.items() if not _is_linear(family, n)})
    layer.dense.update({n: w.to(device, torch.float32) for n, w in layer.tensors.items()})
    layer.folded.update(layer.dense)
    row_factor: dict[str, Tensor] = {}
    # Backwards, so that what a linear's rows take up (v for o, up for down) is decided before the linear is rounded.
    for group in reversed(family.groups):
        originals = {n: weights[f"{n}.weight"].to(device, torch.float32) for n in group.linears}
        own = statistics[group.name]
        realise = _realiser(family, group, weights, heads, device)
        with matmul_precision("medium"):  # candidates are only ranked here
            choice = search_scale(list(originals.values()), own.mean_abs, own.gram, group_size, realise)
        scale = _take_up(layer, family, group, choice.scale, row_factor, weights, heads)
        rounded = _round_group(originals, scale, row_factor, own.gram, group_size)
        rtn_error = sum(output_error(nearest(w, minmax_grid(w, group_size)) - w, own.gram) for w in originals.values())
        error = sum(output_error(rounded[n].effective() - w, own.gram) for n, w in originals.items())
        method = "scale+compensation"
        if not error <= rtn_error:  # also when it is NaN
            method, error = "round-to-nearest", rtn_error
            scale = _take_up(layer, family, group, torch.ones_like(scale), row_factor, weights, heads)
            rounded = _round_group(originals, scale, row_factor, own.gram, group_size, plain=True)
        for name, result in rounded.items():
            packed = pack_weight(result.q, result.grid)
            for kind, tensor in packed._asdict().items():
                layer.tensors[f"{name}.{kind}"] = tensor.cpu()
            layer.dense[f"{name}.weight"] = dequantize(result.q, result.grid)
            layer.folded[f"{name}.weight"] = result.wanted
        layer.groups.insert(
            0,
            GroupReport(
                group.name, group.linears, method, _exponents(choice, method), error, rtn_error, own.gram.shape[1]
            ),
        )
    return layer


@dataclass(frozen=True)
class _Rounded:
    """One linear on its grid. wanted: what was rounded, `W * scale * rows`; all [N, K] but rows [N, 1]."""

    q: Tensor
    grid: Grid
    wanted: Tensor
    scale: Tensor
    rows: Tensor

    def effective(self) -> Tensor:
        """The weight that the original, unscaled input meets."""
        return dequantize(self.q, self.grid) / self.scale / self.rows


def _round_group(
    originals: Mapping[str, Tensor],
    scale: Tensor,
    row_factor: Mapping[str, Tensor],
    gram: Tensor,
    group_size: int,
    plain: bool = False,
) -> dict[str, _Rounded]:
    scaled = scaled_gram(gram, scale)
    results = {}
    for name, weight in originals.items():
        rows = row_factor.get(name, torch.ones((), device=weight.device)).reshape(-1, 1)
        wanted = weight * scale * rows
        if plain:
            grid = minmax_grid(wanted, group_size)
            q = quantize(wanted, grid)
        else:
            grid = search_range(wanted, scaled, group_size)
            q = compensated(wanted, grid, scaled)
        results[name] = _Rounded(q, grid, wanted, scale, rows)
    return results


def _exponents(choice: ScaleChoice, method: str) -> tuple[float, float]:
    return choice.exponents if method != "round-to-nearest" else (0.0, 0.0)


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


def _take_up(
    layer: QuantizedLayer,
    family: Family,
    group: ScaleGroup,
    scale: Tensor,
    row_factor: dict[str, Tensor],
    weights: Mapping[str, Tensor],
    heads: Heads,
) -> Tensor:
    """Give the inverse of a group's scale to what feeds it. Returns the scale that makes this exact."""
    if group.fold == "norm":
        name = f"{group.source}.weight"
        folded, scale = fold_into_norm(weights[name].to(scale.device), scale, family.gain_offset)
        layer.tensors[name] = folded.cpu()
        layer.dense[name] = layer.folded[name] = folded.to(torch.float32)
    elif group.fold == "heads":
        row_factor[group.source] = tie_heads(scale, heads.kv_heads, heads.head_dim).reciprocal()
    else:
        row_factor[group.source] = scale.reciprocal()
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
