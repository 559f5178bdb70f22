"""How much of the divergence each group of linears causes: measured with that group alone quantized.

Some calibration rows run through the 16-bit layers. At each layer a copy of them branches off for each of its groups:
it passes this layer with the quantized weights of the group in place of its own, and all later layers in 16 bits. So
one pass over the layers measures all groups, and memory holds one layer. The rows between two layers lie in a file.

The held-out rows have no part in it: a choice that was made on them would look better on them than it is.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from gemma_awq_cli.awq.grid import dequantize
from gemma_awq_cli.awq.packing import PackedWeight, unpack_weight
from gemma_awq_cli.awq.precision import MEASURED, matmul_precision
from gemma_awq_cli.fidelity.metrics import compare
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward.hidden_states import HiddenStates
from gemma_awq_cli.models.forward.layerwise import TextStack
from gemma_awq_cli.models.forward.memory import return_freed_memory
from gemma_awq_cli.models.gemma.left_groups import LeftGroup, leavable_groups
from gemma_awq_cli.quantize.fold_files import FoldFiles
from gemma_awq_cli.quantize.layer_pass import layer_memory_errors
from gemma_awq_cli.quantize.preparation import Prepared
from gemma_awq_cli.quantize.trials import Sensitivities

ROWS, SEQ_LEN = 8, 128  # calibration rows, and tokens of each
STATE_BYTES = 6_000_000_000  # the most that the rows of all groups take on the disk; a large model has fewer rows
EVERY = 2  # one in this many positions is compared
LIKELY = 64  # tokens of each position whose predictions are compared: all take most of a small model's time
COMPARED = 16  # groups whose predictions are compared at a time


def measure_sensitivities(
    prepared: Prepared, artifact: Path, folds: FoldFiles, folder: Path, on_step: Callable[[], None]
) -> Sensitivities:
    """Return the KL divergence that each group of linears which may stay in 16 bits causes alone.

    artifact: with all linears packed; folds: of it; folder: for the hidden states; on_step: called `steps` times.
    """
    plan, stack = prepared.plan, prepared.stack
    groups = leavable_groups(plan.layouts)
    rows = _rows(prepared, len(groups))
    count = len(rows)
    branches = {group: slice((place + 1) * count, (place + 2) * count) for place, group in enumerate(groups)}
    hidden = HiddenStates(folder, prepared.checkpoint.shape, rows.repeat(1 + len(groups), 1))
    hidden.start(stack.embedder(rows))
    quantized = Checkpoint(artifact)
    batch = max(1, plan.fit.tokens_per_batch // rows.shape[1])
    for index in range(plan.layers):
        with layer_memory_errors(plan, index), matmul_precision(MEASURED):
            module = stack.layer(index, {name: one.to(plan.dtype) for name, one in stack.read_layer(index).items()})
            run = partial(stack.run_layer, index, module)
            own = [group for group in groups if group.layer == index]
            for group in own:
                with _quantized(module, group, quantized, folds, prepared):
                    hidden.branch(index, slice(0, count), branches[group].start, batch, run)
            begun = [branches[group] for group in groups if group.layer < index]
            hidden.advance(index, slice(0, count), batch, run)
            if begun:
                hidden.advance(index, slice(begun[0].start, begun[-1].stop), batch, run)
            del module, run
        return_freed_memory()
        on_step()
    with layer_memory_errors(plan, plan.layers):
        kl = _divergences(prepared, hidden, count, list(branches.values()), on_step)
    return Sensitivities(plan.group_size, rows.numel(), dict(zip(groups, kl, strict=True)))


def sensitivity_steps(prepared: Prepared) -> int:
    """Return how often `measure_sensitivities` calls `on_step`."""
    return prepared.plan.layers + -(-len(leavable_groups(prepared.plan.layouts)) // COMPARED)


def _rows(prepared: Prepared, groups: int) -> Tensor:
    """Some calibration rows [R, S], evenly chosen of all kinds of text, from their beginnings."""
    ids = prepared.rows.ids[:, :SEQ_LEN]
    shape = prepared.checkpoint.shape
    streams = 1 if shape.altup is None else shape.altup.streams
    row_bytes = 2 * 4 * (1 + groups) * ids.shape[1] * streams * shape.hidden
    count = max(1, min(ROWS, len(ids), STATE_BYTES // row_bytes))
    return ids[:: max(1, len(ids) // count)][:count]


@contextmanager
def _quantized(
    module: nn.Module, group: LeftGroup, quantized: Checkpoint, folds: FoldFiles, prepared: Prepared
) -> Iterator[None]:
    """Give a 16-bit layer a group's quantized weights, without its folds, for a while."""
    layout, device = prepared.plan.layouts[group.layer], prepared.stack.device
    factors = folds.read(group.layer, layout)
    linears = dict(zip(group.modules, (layout.linears[name] for name in group.linears), strict=True))
    packed = quantized.read_packed(linears)
    own = {}
    for name, full in zip(group.linears, group.modules, strict=True):
        weight = PackedWeight(*(tensor.to(device) for tensor in packed[full]))
        columns, rows = (factor.to(device) for factor in factors[name])
        linear = module.get_submodule(name)
        own[name] = linear.weight
        linear.weight = nn.Parameter(dequantize(*unpack_weight(weight)) / columns / rows, requires_grad=False)
    try:
        yield
    finally:
        for name, parameter in own.items():
            module.get_submodule(name).weight = parameter


def _divergences(
    prepared: Prepared, hidden: HiddenStates, count: int, branches: Sequence[slice], on_step: Callable[[], None]
) -> list[float]:
    """The mean KL divergence of the predictions of each branch from those of the `count` rows that it branched off.

    The predictions are those among the tokens that the 16-bit model finds likely.
    """
    stack, layers = prepared.stack, prepared.plan.layers
    norm, head = stack.head()

    def final(part: slice) -> Tensor:
        return norm(hidden.read(layers, part).to(stack.device))[:, :-1:EVERY].flatten(0, 1)

    found = []
    with matmul_precision(MEASURED):
        reference = final(slice(0, count))
        likely = head[_likely_tokens(stack, head, reference)]
        for first in range(0, len(branches), COMPARED):
            part = branches[first : first + COMPARED]
            others = torch.cat([final(branch) for branch in part])
            chunks = (
                (one.repeat(len(part), 1), other)
                for one, other in zip(
                    stack.logit_chunks(likely, reference), stack.logit_chunks(likely, others), strict=True
                )
            )
            no_target = torch.zeros(len(others), dtype=torch.int64, device=stack.device)
            kl = compare(chunks, no_target).kl
            found += [float(each) for each in kl.view(len(part), -1).mean(1)]
            on_step()
    return found


def _likely_tokens(stack: TextStack, head: Tensor, states: Tensor) -> Tensor:
    """The tokens that are among the LIKELY most likely ones after any of some normed final states [R, hidden]."""
    best = torch.empty(len(states), 0, device=stack.device)
    tokens = torch.empty(len(states), 0, dtype=torch.int64, device=stack.device)
    first = 0
    for logits in stack.logit_chunks(head, states):
        own = torch.arange(first, first + logits.shape[1], device=stack.device).expand(len(states), -1)
        best, tokens = torch.cat([best, logits], 1), torch.cat([tokens, own], 1)
        best, places = best.topk(min(LIKELY, best.shape[1]), 1)
        tokens = tokens.gather(1, places)
        first += logits.shape[1]
    return torch.unique(tokens)
