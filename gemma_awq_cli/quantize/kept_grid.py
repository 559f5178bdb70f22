"""Checkpoints of quantization-aware training (QAT), whose 16-bit weights lie on a 4-bit grid: found, and kept on it.

Any other rounding would throw that training away. So nothing is searched and nothing is folded: a scale would move the
weights off their grid. Without searches there is nothing to calibrate. Only the held-out rows travel through the
layers.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from gemma_awq_cli.awq.grid import dequantize, minmax_grid, nearest
from gemma_awq_cli.awq.known_grid import KNOWN_GROUP, PART, KnownGrid, find_grid, round_others
from gemma_awq_cli.awq.search import Effort
from gemma_awq_cli.errors import UsageError
from gemma_awq_cli.events import Note, Warned
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.journal import GroupRecord, KeptGroups, LayerRecord
from gemma_awq_cli.models.checkpoints.qat_grid import sample_grids
from gemma_awq_cli.models.gemma.family import ScaleGroup
from gemma_awq_cli.models.gemma.layers import LayerLayout
from gemma_awq_cli.quantize.events import OnEvent
from gemma_awq_cli.quantize.layer import QuantizedLayer
from gemma_awq_cli.quantize.request import IGNORE, KEEP, QuantizeRequest

KEPT_SHARE = 0.99  # of the groups with any weight but 0, from which on a checkpoint is one of QAT
LEAST_SHARE = 0.5  # the share that --qat keep needs
METHOD = "kept grid"
UNFETCHED = "Planned from the files' headers, which do not say whether the weights lie on a 4-bit grid"
NO_CALIBRATION = "none"  # the description of the calibration rows


def decide_on_grid(request: QuantizeRequest, checkpoint: Checkpoint, dtype: torch.dtype, on_event: OnEvent) -> bool:
    """Return whether the weights keep a grid that they are on, and report it. Raises if there is none to keep.

    dtype: of the artifact's 16-bit weights.
    """
    if request.qat == IGNORE or checkpoint.adapter is not None:  # an adapter moves weights off their grid
        return False
    if not checkpoint.fetched:
        if request.qat != KEEP:
            on_event(Note(f"{UNFETCHED}, as for any other; --qat keep plans for a QAT checkpoint."))
        return request.qat == KEEP
    share = sample_grids(checkpoint, dtype).share
    found = f"{percent(share)} of the weights lie on a 4-bit grid in groups of {KNOWN_GROUP}"
    if request.qat == KEEP and share < LEAST_SHARE:
        raise UsageError(
            f"There is no grid to keep: {found}.",
            "Leave out --qat to quantize this checkpoint like any other.",
        )
    if share >= KEPT_SHARE or request.qat == KEEP:
        on_event(Note(f"QAT checkpoint: {found}. They stay on it: no scales, no calibration."))
        return True
    if share >= LEAST_SHARE:
        on_event(Warned(f"{found}, fewer than in a QAT checkpoint. They are rounded again; --qat keep keeps the grid."))
    return False


def grid_group_size(asked: int | None) -> int:
    """Return the group size of a grid that is kept. Raises if another one is asked for."""
    if asked not in (None, KNOWN_GROUP):
        raise UsageError(
            f"The weights of this QAT checkpoint lie on a grid in groups of {KNOWN_GROUP}, which --group-size {asked} "
            "cannot hold.",
            "Leave out --group-size, or use --qat ignore to quantize it like any other checkpoint.",
        )
    return KNOWN_GROUP


def percent(share: float) -> str:
    """Return a share as a percentage that is 100 only if it is all."""
    return "100 %" if share == 1 else f"{min(100 * share, 99.99):.2f} %"


def keep_layer(
    layout: LayerLayout, weights: Mapping[str, Tensor], device: torch.device, effort: Effort
) -> QuantizedLayer:
    """Pack one layer with every group of weights on the grid that it is on. The other groups are rounded alone.

    weights: all of the layer's parameters in the dtype that is stored, by name.
    """
    places, packed = layout.places(), layout.unpacked()
    layer = QuantizedLayer({name: weight.cpu() for name, weight in weights.items() if name not in packed})
    for group, linears in _groups(layout):
        error = rtn_error = 0.0
        counts = []
        for name in linears:
            weight = weights[places[name].tensor][places[name].part].to(device)
            known = find_grid(weight)
            round_others(known, weight, effort)
            one = torch.ones(1, 1, device=device)
            layer.add({name: weight}, one[0].expand(weight.shape[1]), one.expand(weight.shape[0], 1), known.rounded)
            counts.append(_counted(known))
            stored, nearest_stored = _weight_errors(weight, known)
            error, rtn_error = error + stored, rtn_error + nearest_stored
        layer.groups.append(GroupRecord(group.name, group.linears, METHOD, (), error, rtn_error, 0, _sum(counts)))
    return layer


def _groups(layout: LayerLayout) -> Iterator[tuple[ScaleGroup, Iterable[str]]]:
    """Each group of a layer with the names of its linears; those of the experts with the linears of all of them."""
    yield from ((group, group.linears) for group in layout.groups)
    if layout.experts is not None:
        for group in (layout.experts.gate_up, layout.experts.down):
            names = (f"experts.{e}.{linear}" for e in range(layout.experts.count) for linear in group.linears)
            yield replace(group, linears=tuple(f"experts.*.{linear}" for linear in group.linears)), list(names)


def kept_groups(records: Iterable[LayerRecord]) -> KeptGroups:
    """Return the sum of the records' counts."""
    return _sum(group.kept for record in records for group in record.groups if group.kept is not None)


def _counted(known: KnownGrid) -> KeptGroups:
    return KeptGroups(known.placed.numel(), int(known.placed.sum()), int(known.exact.sum()))


def _sum(counts: Iterable[KeptGroups]) -> KeptGroups:
    each = list(counts)
    return KeptGroups(sum(c.groups for c in each), sum(c.on_grid for c in each), sum(c.exact for c in each))


def _weight_errors(weight: Tensor, known: KnownGrid) -> tuple[float, float]:
    """Return the summed squared errors of the stored weights, in the dtype of `weight`, and of round-to-nearest."""
    error = rtn_error = 0.0
    count = max(1, PART // weight.shape[1])
    for start in range(0, weight.shape[0], count):
        rows = slice(start, start + count)
        original = weight[rows].float()
        stored = dequantize(*known.rounded.rows(rows)).to(weight.dtype).float()
        error += float((stored - original).square().sum())
        rtn_error += float((nearest(original, minmax_grid(original, KNOWN_GROUP)) - original).square().sum())
    return error, rtn_error
