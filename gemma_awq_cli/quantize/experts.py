"""Quantizing the experts of one layer, one at a time.

All experts read the same norm, so their gate_proj and up_proj get one scale, which the norm takes up. It minimizes the
sum of the experts' errors. Each down_proj has a scale of its own, which the rows of its up_proj take up; so the
down_projs come first. The router reads the residual before the norm and sees no scale.
"""

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from gemma_awq_cli.awq.gptq import residuals
from gemma_awq_cli.awq.round_group import round_and_compare, round_nearest
from gemma_awq_cli.awq.search import BALANCED, Effort, ScaledInput, search_common_scale, search_scale
from gemma_awq_cli.models.checkpoints.journal import ExpertsRecord, GroupRecord
from gemma_awq_cli.models.forward.memory import return_freed_memory
from gemma_awq_cli.models.gemma.layers import Experts, LayerLayout, Place
from gemma_awq_cli.quantize.expert_inputs import SEARCHED, ExpertInputs
from gemma_awq_cli.quantize.folding import fold_norm, foldable_scale, source_rows
from gemma_awq_cli.quantize.layer import COMPENSATED, DESCENDED, NEAREST, QuantizedLayer

TIDIED = 8  # experts


def quantize_experts(
    layer: QuantizedLayer,
    layout: LayerLayout,
    gain_offset: float,
    weights: Mapping[str, Tensor],
    inputs: ExpertInputs,
    group_size: int,
    device: torch.device,
    effort: Effort = BALANCED,
) -> None:
    """Add a layer's experts to `layer`: their linears, their folded norm, and a record of either group.

    gain_offset, weights: as in `quantize_layer`. One expert at a time is held in float32.
    """
    experts = inputs.experts
    sample_rows = max(1, SEARCHED * effort.rows // experts.count)
    searched, downs = [], []
    for expert in range(experts.count):
        gate_up = _gate_up(experts, weights, expert, device)
        downs.append(_quantize_down(layer, layout, weights, inputs, expert, gate_up, group_size, effort))
        sample = gate_up[:: -(-gate_up.shape[0] // sample_rows)].clone()
        searched.append(ScaledInput([sample], residuals(inputs.gate_up(expert))))
        del gate_up
        _tidy(expert)
    choice = search_common_scale(
        searched,
        inputs.mean_abs,
        group_size,
        foldable_scale(layout, experts.gate_up, weights, gain_offset, device),
        effort=effort,
    )
    del searched
    folded, scale = fold_norm(experts.gate_up, choice.scale, weights, gain_offset)
    method, exponents = DESCENDED if choice.descended else COMPENSATED, choice.exponents
    error, rtn_error, block = 0.0, 0.0, 0
    for expert in range(experts.count):
        gate_up, rows = _gate_up(experts, weights, expert, device), _rows(layer, experts, expert, device)
        gram = inputs.gate_up(expert)
        rounded, own, own_rtn = round_and_compare(gate_up, scale, rows, gram, group_size, effort)
        error, rtn_error, block = error + own, rtn_error + own_rtn, gram.shape[1]
        layer.add(_named(expert, experts.gate_up.linears, gate_up), scale, rows, rounded)
        del gate_up, rows, gram, rounded
        _tidy(expert)
    if not error <= rtn_error:  # also if it is NaN
        method, exponents, error = NEAREST, (0.0, 0.0), rtn_error
        folded, scale = fold_norm(experts.gate_up, torch.ones_like(scale), weights, gain_offset)
        for expert in range(experts.count):
            gate_up, rows = _gate_up(experts, weights, expert, device), _rows(layer, experts, expert, device)
            rounded = round_nearest(gate_up, scale, rows, group_size)
            layer.add(_named(expert, experts.gate_up.linears, gate_up), scale, rows, rounded)
    layer.tensors[f"{experts.gate_up.source}.weight"] = folded.cpu()
    layer.groups += [
        ExpertsRecord(
            experts.gate_up.name, _shown(experts.gate_up.linears), method, exponents, error, rtn_error, block,
            starved=inputs.starved(),
        ),
        _sum(experts.down.name, _shown(experts.down.linears), downs),
    ]  # fmt: skip


def _quantize_down(
    layer: QuantizedLayer,
    layout: LayerLayout,
    weights: Mapping[str, Tensor],
    inputs: ExpertInputs,
    expert: int,
    gate_up: Tensor,
    group_size: int,
    effort: Effort,
) -> GroupRecord:
    """Quantize one down_proj, and set the factors of the rows of its up_proj.

    gate_up: the expert's original weights [2 * intermediate, hidden] float32.
    """
    group = inputs.experts.down
    (name, place), device = _places(inputs.experts, expert, group.linears)[0], gate_up.device
    weight = weights[place.tensor][place.part].to(device).to(torch.float32)
    statistics = inputs.down(expert, *gate_up.chunk(2))
    ones, rows = torch.ones(weight.shape[1], device=device), torch.ones(weight.shape[0], 1, device=device)
    choice = search_scale(
        [weight], statistics.mean_abs, residuals(statistics.gram), group_size, lambda scale: scale, effort=effort
    )
    scale, method = choice.scale, DESCENDED if choice.descended else COMPENSATED
    rounded, error, rtn_error = round_and_compare(weight, scale, rows, statistics.gram, group_size, effort)
    if not error <= rtn_error:  # also if it is NaN
        scale, method, error = ones, NEAREST, rtn_error
        rounded = round_nearest(weight, scale, rows, group_size)
    layer.add({name: weight}, scale, rows, rounded)
    layer.rows[f"experts.{expert}.{group.source}"] = source_rows(layout, group, scale)
    return GroupRecord(group.name, (name,), method, (), error, rtn_error, statistics.gram.shape[1])


def _tidy(expert: int) -> None:
    """Return freed memory to the system after every few experts: their results lie between larger freed blocks."""
    if expert % TIDIED == TIDIED - 1:
        return_freed_memory()


def _sum(name: str, linears: tuple[str, ...], records: list[GroupRecord]) -> GroupRecord:
    """One record for all experts: the sums of their errors, and the method that most of them got."""
    method = Counter(record.method for record in records).most_common(1)[0][0]
    error, rtn_error = (sum(getattr(record, kind) for record in records) for kind in ("error", "rtn_error"))
    return GroupRecord(name, linears, method, (), error, rtn_error, records[0].gram_block)


def _places(experts: Experts, expert: int, linears: tuple[str, ...]) -> list[tuple[str, Place]]:
    """The names and places of some linears of one expert."""
    places = experts.places(expert)
    return [(name, places[name]) for name in (f"experts.{expert}.{linear}" for linear in linears)]


def _gate_up(experts: Experts, weights: Mapping[str, Tensor], expert: int, device: torch.device) -> Tensor:
    """The original gate_proj and, below it, up_proj of one expert: [2 * intermediate, hidden] float32."""
    places = _places(experts, expert, experts.gate_up.linears)
    return torch.cat([weights[place.tensor][place.part].to(device).to(torch.float32) for _, place in places])


def _rows(layer: QuantizedLayer, experts: Experts, expert: int, device: torch.device) -> Tensor:
    """The factors of the rows of `_gate_up`: [2 * intermediate, 1]. Those of gate_proj are 1."""
    up = layer.rows[f"experts.{expert}.{experts.down.source}"]
    return torch.cat([torch.ones_like(up), up]).to(device)


def _named(expert: int, linears: tuple[str, ...], stacked: Tensor) -> dict[str, Tensor]:
    names = (f"experts.{expert}.{linear}" for linear in linears)
    return dict(zip(names, stacked.chunk(len(linears)), strict=True))


def _shown(linears: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"experts.*.{linear}" for linear in linears)
