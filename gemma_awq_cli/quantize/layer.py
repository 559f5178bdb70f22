"""Quantizing one decoder layer: search a scale per group, fold it, round, and keep the better result.

Every decision is made per group of linears that share an input, on the Gram matrix of the calibration tokens. A group
whose result would be worse than plain round-to-nearest gets plain round-to-nearest.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gemma_awq_cli.awq.error_propagation import correct
from gemma_awq_cli.awq.gptq import residuals
from gemma_awq_cli.awq.gram import InputStatistics
from gemma_awq_cli.awq.grid import dequantize
from gemma_awq_cli.awq.output_feedback import OutputFeedback
from gemma_awq_cli.awq.packing import PackedWeight, pack_weight, unpack_weight
from gemma_awq_cli.awq.round_group import Rounded, round_and_compare, round_nearest
from gemma_awq_cli.awq.row_shares import ALONE, RowShares
from gemma_awq_cli.awq.search import BALANCED, Effort, search_scale
from gemma_awq_cli.kernels import column_loops  # noqa: F401 (a GPU's kernels for the loops of `awq`)
from gemma_awq_cli.models.checkpoints.journal import GroupRecord
from gemma_awq_cli.models.gemma.family import ScaleGroup
from gemma_awq_cli.models.gemma.layers import LayerLayout
from gemma_awq_cli.quantize.folding import fold_norm, foldable_scale, source_rows, tied_columns

NEAREST, COMPENSATED, DESCENDED = "round-to-nearest", "scale+compensation", "descended scale+compensation"
UNSCALED = "compensation"
LEFT = "16 bits"  # of a group that is not rounded
WITH_FEEDBACK = "+row feedback"  # after any of them but the first


@dataclass
class QuantizedLayer:
    """A quantized layer. Names are relative to the layer.

    tensors: what is written; groups: the decisions, in the order of the layout; columns, rows: what each linear's
    weight was multiplied by before it was rounded, [K] and [N, 1] float32.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    groups: list[GroupRecord] = field(default_factory=list)
    columns: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)

    def add(self, originals: Mapping[str, Tensor], columns: Tensor, rows: Tensor, rounded: Rounded) -> None:
        """Add a group's rounded linears. originals: their weights by name, in the order of `rounded`'s rows."""
        start = 0
        for name, weight in originals.items():
            part = slice(start, start + weight.shape[0])
            start = part.stop
            self.columns[name], self.rows[name] = columns, rows[part]
            for kind, tensor in pack_weight(*rounded.rows(part))._asdict().items():
                self.tensors[f"{name}.{kind}"] = tensor.cpu()


def folded_weights(
    layer: QuantizedLayer, layout: LayerLayout, weights: Mapping[str, Tensor], device: torch.device
) -> dict[str, Tensor]:
    """Return float32 weights of the folded but unquantized layer. Norms are as they are stored.

    weights: the original layer's, by name.
    """
    folded = _to_fill(layer.tensors, layout, device)
    for name, (tensor, part) in layout.places().items():
        weight = folded[tensor][part]
        weight.copy_(weights[tensor][part]).mul_(layer.columns[name]).mul_(layer.rows[name])
    return folded


def dense_weights(tensors: Mapping[str, Tensor], layout: LayerLayout, device: torch.device) -> dict[str, Tensor]:
    """Return float32 weights that compute what the packed layer computes, from the tensors that are written.

    A linear may be among these in 16 bits.
    """
    dense = _to_fill(tensors, layout, device)
    for name, (tensor, part) in layout.places().items():
        if tensor in tensors:
            continue
        packed = PackedWeight(*(tensors[f"{name}.{kind}"].to(device) for kind in PackedWeight._fields))
        dense[tensor][part] = dequantize(*unpack_weight(packed))
    return dense


def _to_fill(tensors: Mapping[str, Tensor], layout: LayerLayout, device: torch.device) -> dict[str, Tensor]:
    """The float32 tensors that transformers' layer has. Those of the quantized linears are still empty."""
    empty = {name: torch.empty(shape, device=device) for name, shape in layout.unpacked().items()}
    packed = {f"{name}.{kind}" for name in layout.places() for kind in PackedWeight._fields}
    return empty | {n: t.to(device).to(torch.float32) for n, t in tensors.items() if n not in packed}


def quantize_layer(
    layout: LayerLayout,
    gain_offset: float,
    weights: Mapping[str, Tensor],
    observed: Iterable[tuple[ScaleGroup, InputStatistics]],
    group_size: int,
    device: torch.device,
    effort: Effort = BALANCED,
    information: Mapping[str, Sequence[Tensor]] | None = None,
    shares: RowShares = ALONE,
) -> QuantizedLayer:
    """Quantize one layer, but for its experts (see experts.py).

    gain_offset: of the family's norms; weights: all of the layer's parameters in the dtype that is stored, by name;
    observed: the groups from the last to the first with the statistics of their inputs (`Observer.hand_over`). The last
    comes first, so that the rows that a linear gets from folding (v from o, up from down) are known when it is rounded.
    information: of the outputs of groups by their names, see `OutputFeedback`; the rows of other groups are rounded
    alone. shares: of the outputs that each process corrects and rounds.
    """
    layer = QuantizedLayer({name: weight.cpu() for name, weight in weights.items() if name not in layout.unpacked()})
    for group, statistics in observed:
        own = None if information is None else information.get(group.name)
        record = _quantize_group(
            layer, layout, gain_offset, weights, group, statistics, group_size, device, effort, own, shares
        )
        layer.groups.insert(0, record)
    return layer


def _quantize_group(
    layer: QuantizedLayer,
    layout: LayerLayout,
    gain_offset: float,
    weights: Mapping[str, Tensor],
    group: ScaleGroup,
    statistics: InputStatistics,
    group_size: int,
    device: torch.device,
    effort: Effort,
    information: Sequence[Tensor] | None,
    shares: RowShares,
) -> GroupRecord:
    """Quantize one group, and add its linears and its folded source to `layer`."""
    gram = statistics.gram
    stacked = _stacked(weights, group.linears, device)
    if (error_gram := statistics.take_error_gram()) is not None:
        mine = shares.own(stacked.shape[0])
        if mine.stop > mine.start:
            correct(stacked[mine], error_gram, gram, effort.correction)
        shares.fill(stacked)
    del error_gram
    outputs = [layout.linears[name].outputs for name in group.linears]
    originals = dict(zip(group.linears, stacked.split(outputs), strict=True))
    rows, ones = _row_factors(layer, originals), torch.ones(stacked.shape[1], device=device)

    def fold(scale: Tensor) -> Tensor:
        """Fold the inverse of a scale into the group's source; returns the scale that makes this exact."""
        if group.source is None:
            return ones
        if group.fold == "norm":
            folded, scale = fold_norm(group, scale, weights, gain_offset)
            layer.tensors[f"{group.source}.weight"] = folded.cpu()
        else:
            layer.rows[group.source] = source_rows(layout, group, scale)
        return scale

    feedback = None
    if information is not None:
        feedback = OutputFeedback([matrix.to(device).to(torch.float32) for matrix in information], effort.feedback)
    method, exponents, scale = UNSCALED, (0.0, 0.0), ones
    if group.source is not None:
        choice = search_scale(
            list(originals.values()),
            statistics.mean_abs,
            residuals(gram),
            group_size,
            foldable_scale(layout, group, weights, gain_offset, device),
            tied_columns(layout, group, device),
            effort,
            None if feedback is None else feedback.importances.split(outputs),
        )
        method, exponents = DESCENDED if choice.descended else COMPENSATED, choice.exponents
        scale = fold(shares.of_first(choice.scale))  # the others' could differ in the last bit on another machine
    if feedback is not None:
        method += WITH_FEEDBACK
    rounded, error, rtn_error = round_and_compare(stacked, scale, rows, gram, group_size, effort, feedback, shares)
    if not error <= rtn_error:  # also if it is NaN
        method, exponents, error = NEAREST, (0.0, 0.0), rtn_error
        scale = fold(ones)
        rounded = round_nearest(stacked, scale, rows, group_size)
    layer.add(originals, scale, rows, rounded)
    return GroupRecord(group.name, group.linears, method, exponents, error, rtn_error, gram.shape[1])


def _stacked(weights: Mapping[str, Tensor], linears: Sequence[str], device: torch.device) -> Tensor:
    """Return the weights of a group's linears on top of each other: [N, K] float32."""
    parts = [weights[f"{name}.weight"] for name in linears]
    stacked = torch.empty(sum(p.shape[0] for p in parts), parts[0].shape[1], device=device)
    start = 0
    for part in parts:
        stacked[start : start + part.shape[0]] = part.to(device)
        start += part.shape[0]
    return stacked


def _row_factors(layer: QuantizedLayer, originals: Mapping[str, Tensor]) -> Tensor:
    """Return the factors of the stacked rows of a group's linears, as far as folding has set them: [N, 1]."""
    ones = torch.ones(1, 1)
    return torch.cat([layer.rows.get(n, ones.to(w.device)).expand(w.shape[0], 1) for n, w in originals.items()])
