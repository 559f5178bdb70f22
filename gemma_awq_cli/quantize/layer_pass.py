"""One layer of the model, from its input to its output on both paths: observe, quantize, prove the folds, go on."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn

from gemma_awq_cli.awq.gram import InputStatistics
from gemma_awq_cli.awq.precision import matmul_precision
from gemma_awq_cli.awq.row_shares import ALONE, RowShares
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.kernels.compiled_columns import compiled_columns
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward.compiled_attention import compiled_attention
from gemma_awq_cli.models.forward.compiled_elements import compiled_elements
from gemma_awq_cli.models.forward.hidden_states import HiddenStates, Run
from gemma_awq_cli.models.forward.layerwise import TextStack
from gemma_awq_cli.models.forward.memory import copies_from_pinned, is_refusal, return_freed_memory
from gemma_awq_cli.models.gemma.family import ScaleGroup
from gemma_awq_cli.models.gemma.layers import LayerLayout
from gemma_awq_cli.quantize.expert_inputs import ExpertInputs
from gemma_awq_cli.quantize.experts import quantize_experts
from gemma_awq_cli.quantize.folding import fold_deviation, require_exact_fold
from gemma_awq_cli.quantize.information_files import InformationFiles
from gemma_awq_cli.quantize.input_statistics import Observer, bfloat16_products, rounded_once
from gemma_awq_cli.quantize.kept_grid import keep_layer
from gemma_awq_cli.quantize.layer import QuantizedLayer, dense_weights, folded_weights, quantize_layer
from gemma_awq_cli.quantize.output_information import layer_information
from gemma_awq_cli.quantize.plan import Plan
from gemma_awq_cli.quantize.products import compiled_loops, compiled_products, measured, sums_for
from gemma_awq_cli.quantize.statistics_files import StatisticsFiles


def process_layer(
    checkpoint: Checkpoint,
    stack: TextStack,
    plan: Plan,
    hidden: HiddenStates,
    information: InformationFiles,
    index: int,
    shares: RowShares = ALONE,
    statistics: StatisticsFiles | None = None,
) -> QuantizedLayer:
    """Quantize layer `index`, counted from 0, and write the hidden states behind it.

    Rows that `hidden` does not have take no time: without held-out rows only the calibration rows go on.
    information: which a plan with feedback between rows has been measured for. shares: of the calibration rows, of
    which `hidden` has this process's, and of the outputs that are rounded. statistics: where those of the calibration
    rows are found, or kept for other group sizes.
    """
    weights = _read(stack, plan, index)
    batch = plan.rows_per_batch
    sample = hidden.read_batch(index, slice(0, 1))

    def forward_of(module: nn.Module) -> Run:
        return partial(stack.run_layer, index, module)

    module = stack.layer(index, weights)
    with matmul_precision("highest"):
        expected = stack.run_layer(index, module, *sample)
        carried = stack.carried(index, module, sample[0].to(stack.device))
    with matmul_precision("medium"):
        layout, observed, experts = plan.layouts[index], None, None
        if statistics is not None and statistics.found:
            observed = statistics.read(index, stack.device)
        elif not plan.keeps_grid:
            observed, experts = _observe(stack, plan, hidden, index, module, shares, statistics)
    with measured(module, stack.device):
        hidden.advance(index, hidden.heldout, batch, forward_of(module))
    del module
    return_freed_memory()
    gain_offset = checkpoint.family.gain_offset
    if observed is None:
        layer = keep_layer(layout, weights, stack.device, plan.effort)
    else:
        known = layer_information(information, layout, index) if plan.feedback_tokens else None
        with compiled_columns(compiled_loops(stack.device)):
            layer = quantize_layer(
                layout, gain_offset, weights, observed, plan.group_size, stack.device, plan.effort, known, shares
            )
            del known
            if experts is not None:
                quantize_experts(
                    layer, layout, gain_offset, weights, experts, plan.group_size, stack.device, plan.effort
                )
        if experts is not None:
            del experts
            return_freed_memory()
    module = stack.layer(index, folded_weights(layer, layout, weights, stack.device))
    with matmul_precision("highest"):
        require_exact_fold(index, fold_deviation(expected, stack.run_layer(index, module, *sample), carried))
    del module
    if shares.count > 1 or hidden.heldout_quantized.stop > hidden.heldout_quantized.start:
        module = stack.layer(index, dense_weights(layer.tensors, layout, stack.device))
        with measured(module, stack.device):
            hidden.advance(index, hidden.heldout_quantized, batch, forward_of(module))
        if index + 1 < plan.layers:  # nobody reads the calibration rows after the last layer
            with matmul_precision("medium"), _observed(stack, module):
                hidden.advance(index, hidden.calibration_quantized, batch, forward_of(module))
    return layer


def pass_calibration(stack: TextStack, plan: Plan, hidden: HiddenStates, index: int) -> None:
    """Write the hidden states of the calibration rows behind layer `index`, as `process_layer` does, and no more."""
    module = stack.layer(index, _read(stack, plan, index))
    with matmul_precision("medium"), _observed(stack, module):
        rows = max(1, plan.rows_per_batch // plan.effort.paths)
        hidden.advance(index, hidden.calibration, rows, partial(stack.run_layer, index, module))


def pass_quantized(
    stack: TextStack, plan: Plan, hidden: HiddenStates, index: int, tensors: Mapping[str, Tensor]
) -> None:
    """Write the hidden states of the calibration rows behind the quantized layer `index`, as `process_layer` does.

    tensors: of the quantized layer, as they are written.
    """
    module = stack.layer(index, dense_weights(tensors, plan.layouts[index], stack.device))
    with matmul_precision("medium"), _observed(stack, module):
        run = partial(stack.run_layer, index, module)
        hidden.advance(index, hidden.calibration_quantized, plan.rows_per_batch, run)


def pass_heldout(stack: TextStack, plan: Plan, hidden: HiddenStates, index: int, tensors: Mapping[str, Tensor]) -> None:
    """Write the hidden states of the held-out rows behind layer `index` on both paths, as `process_layer` does.

    tensors: of the quantized layer, as they are written.
    """
    for rows, weights in (
        (hidden.heldout, _read(stack, plan, index)),
        (hidden.heldout_quantized, dense_weights(tensors, plan.layouts[index], stack.device)),
    ):
        module = stack.layer(index, weights)
        with measured(module, stack.device):
            hidden.advance(index, rows, plan.rows_per_batch, partial(stack.run_layer, index, module))


def _observe(
    stack: TextStack,
    plan: Plan,
    hidden: HiddenStates,
    index: int,
    module: nn.Module,
    shares: RowShares,
    statistics: StatisticsFiles | None,
) -> tuple[Iterator[tuple[ScaleGroup, InputStatistics]], ExpertInputs | None]:
    """Run the calibration rows through a layer, and return what its groups and its experts got.

    The statistics as by `Observer.hand_over`; the rest as in `process_layer`.
    """
    layout, paired, sums = plan.layouts[index], plan.effort.paths == 2, sums_for(stack.device)
    observer = Observer(layout, module, plan.group_size, plan.fit.gram_limit, stack.device, paired, sums)
    experts = _expert_inputs(plan, layout, module, hidden, stack)
    rows = max(1, plan.rows_per_batch // plan.effort.paths)
    beside = hidden.calibration_quantized if paired else None
    with _observed(stack, module):
        hidden.advance(index, hidden.calibration, rows, partial(stack.run_layer, index, module), beside)
    observer.finish(index, shares)
    if statistics is not None:
        statistics.add(index, observer.statistics)
    if experts is not None:
        experts.finish(index)
    return observer.hand_over(), experts


@contextmanager
def _observed(stack: TextStack, module: nn.Module) -> Iterator[None]:
    """Run a layer's module in bfloat16 where the device multiplies it: for rows that are not measured."""
    library, elements = compiled_products(stack.device), compiled_elements(module, compiled_loops(stack.device))
    with bfloat16_products(stack.device), rounded_once(module), compiled_attention(module, library), elements:
        yield


def _read(stack: TextStack, plan: Plan, index: int) -> dict[str, Tensor]:
    """A layer's parameters in the dtype that is stored, on the device. The next one's are read meanwhile."""
    stored = stack.read_layer(index)
    if index + 1 < plan.layers:
        stack.read_ahead(index + 1)
    waits_not = copies_from_pinned(stack.device)
    # converted there: no processor core does it, which would take longer than to upload 32 bits
    return {name: one.to(stack.device, non_blocking=waits_not).to(plan.dtype) for name, one in stored.items()}


def _expert_inputs(
    plan: Plan, layout: LayerLayout, module: nn.Module, hidden: HiddenStates, stack: TextStack
) -> ExpertInputs | None:
    """What collects the inputs of a layer's experts; None if it has none."""
    if layout.experts is None:
        return None
    rows = hidden.calibration.stop - hidden.calibration.start
    paired = plan.effort.paths == 2
    return ExpertInputs(
        layout, module, plan.group_size, plan.fit.gram_limit, stack.device, rows, hidden.seq_len, paired,
        sums_for(stack.device),
    )  # fmt: skip


@contextmanager
def layer_memory_errors(plan: Plan, index: int) -> Iterator[None]:
    """Turn an allocator's refusal in layer `index` into an error that says how to go on.

    A smaller plan sums in another order, so layers that are finished cannot be resumed with it.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_refusal(error):
            raise
        smaller = f"--max-memory {plan.smaller / 1e9:.1f}GB" if plan.smaller else "shorter rows (--seq-len)"
        if index:
            hint = f"Close other programs and continue with --resume, or start over with --force and {smaller}."
        else:
            hint = f"Close other programs, or use {smaller}."
        planned, whose = plan.memory_bytes, ""
        if plan.device_bytes is not None:
            planned, whose = plan.device_bytes, "of GPU memory "
        where = f"layer {index + 1}" if index < plan.layers else "comparing the predictions"
        raise GemmaAwqError(f"Out of memory in {where} ({planned / 1e9:.1f} GB {whose}were planned).", hint) from None
