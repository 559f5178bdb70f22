"""The plan of a quantization: the tensors that will be written, and the memory and time that it needs.

It reads the headers of a checkpoint and no weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from gemma_awq_cli.awq.group_sizes import GROUP_SIZES
from gemma_awq_cli.awq.packed_arrays import PACK
from gemma_awq_cli.awq.search import Effort
from gemma_awq_cli.calibration_text.rows import Rows
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.writing import PlannedTensor, files_bytes
from gemma_awq_cli.models.forward.hidden_states import STATE_FILES, state_bytes
from gemma_awq_cli.models.forward.layerwise import TextStack
from gemma_awq_cli.models.forward.memory import device_memory, free_memory
from gemma_awq_cli.models.gemma.families import FLOAT16_REASON
from gemma_awq_cli.models.gemma.layers import LayerLayout, Linear, layers_of
from gemma_awq_cli.models.gemma.left_groups import LeftGroup
from gemma_awq_cli.quantize.estimates import (
    CONTEXT_BYTES,
    FLOAT32,
    LIBRARY_BYTES,
    Fit,
    Workload,
    device_peak_bytes,
    host_peak_bytes,
    information_disk_bytes,
    peak_bytes,
    sampling_bytes,
    seconds,
)
from gemma_awq_cli.quantize.input_statistics import multiplies_bfloat16
from gemma_awq_cli.quantize.own_rows import OwnRows
from gemma_awq_cli.quantize.products import flops_per_second
from gemma_awq_cli.quantize.quality import DEFAULT_QUALITY, QUALITIES

DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
FITS = tuple(
    Fit(tokens, limit) for limit in (8192, 4096, 2048, 1024) for tokens in (4096, 2048, 1024, 512) if tokens <= limit
)
# Tokens in a batch on the CPU, whose cache then holds what one operation hands to the next: 15 % faster than 4096.
CPU_TOKENS = 2048
CPU_FITS = tuple(fit for fit in FITS if fit.tokens_per_batch <= CPU_TOKENS)
NO_LAYOUT = "This model cannot be stored in the AutoAWQ layout."
MUCH_SMALLER = 0.9  # the share of a plan's memory below which another plan is worth suggesting


@dataclass(frozen=True)
class Plan:
    """What a quantization will do. Sizes are in bytes.

    layouts: one per layer; tensors: all that the artifact will hold; memory_bytes: of the system's memory;
    device_bytes: of the memory of a GPU that has its own, else None; smaller: what the next smaller fit needs of the
    memory that is planned, the GPU's if it has its own; None if there is no such fit; state_bytes: on the disk while
    the work goes on; seconds: None on a GPU, where none was measured; keeps_grid: whether the weights stay on the 4-bit
    grid that they are on, and nothing is searched; processes: how many share out the work, each with the memory that
    is planned; shares_rows: whether all work on one layer at a time, each on some of the rows, and not on layers apart;
    holds_states: whether a GPU with its own memory holds the hidden states of all rows too;
    feedback_tokens: rows and tokens of each that feedback between the rows of weights is measured on, None
    without it; left: the groups of linears that stay in 16 bits.
    """

    layouts: tuple[LayerLayout, ...]
    quantized_linears: int
    group_size: int
    dtype: torch.dtype
    tensors: tuple[PlannedTensor, ...]
    source_bytes: int
    artifact_bytes: int
    fit: Fit
    rows_per_batch: int
    memory_bytes: int
    device_bytes: int | None
    smaller: int | None
    state_bytes: int
    seconds: float | None
    effort: Effort
    keeps_grid: bool = False
    processes: int = 1
    shares_rows: bool = False
    holds_states: bool = False
    feedback_tokens: tuple[int, int] | None = None
    left: tuple[LeftGroup, ...] = ()

    @property
    def file_bytes(self) -> int:
        """The bytes of the artifact's safetensors files, headers included."""
        return files_bytes(self.tensors)

    @property
    def layers(self) -> int:
        return len(self.layouts)

    @property
    def dtype_name(self) -> str:
        return DTYPE_NAMES[self.dtype]


def stored_dtype(checkpoint: Checkpoint, asked: str | None) -> torch.dtype:
    """Return the dtype of the weights that stay in 16 bits.

    It is the one that is asked for, else the checkpoint's, and bfloat16 for a 32-bit checkpoint.
    """
    dtype = {name: dtype for dtype, name in DTYPE_NAMES.items()}[asked] if asked else checkpoint.dtype
    if dtype == torch.float16 and not checkpoint.family.float16:
        if asked:
            raise GemmaAwqError(
                f"float16 is not possible for {checkpoint.family.title}: {FLOAT16_REASON}.", "Use --dtype bfloat16."
            )
        return torch.bfloat16
    return dtype if dtype in DTYPE_NAMES else torch.bfloat16


def choose_group_size(layouts: tuple[LayerLayout, ...], asked: int | None) -> tuple[int, str | None]:
    """Return the group size: `asked`, or the largest that divides the inputs of every linear.

    Also returns a line on why it is not the largest of all, None if it is. Raises if the size or the packed layout does
    not fit a linear.
    """
    linears = quantized_linears(layouts)
    for name, (_, linear) in linears.items():
        if linear.outputs % PACK:
            raise GemmaAwqError(
                f"{name} has {linear.outputs} outputs, and the AutoAWQ layout needs a multiple of {PACK}.", NO_LAYOUT
            )
    first = asked or GROUP_SIZES[0]
    unfit = next(((name, one.inputs) for name, (_, one) in linears.items() if one.inputs % first), None)
    if unfit is None:
        return first, None
    problem = f"{first} does not divide the {unfit[1]} inputs of {unfit[0]}"
    fits = fitting_group_sizes(layouts)
    if not fits:
        raise GemmaAwqError(f"Group size {problem}.", f"{NO_LAYOUT} No group size divides them.")
    if asked:
        raise GemmaAwqError(f"Group size {problem}.", f"Use --group-size {' or '.join(map(str, fits))}.")
    return fits[0], f"The group size is {fits[0]}: {problem}."


def quantized_linears(layouts: tuple[LayerLayout, ...]) -> dict[str, tuple[str, Linear]]:
    """Return the linears that become 4-bit by name, each with the name of the 16-bit tensor that holds its weight."""
    found = {}
    for index, layout in enumerate(layouts):
        places = layout.places()
        for name, linear in layout.packed().items():
            found[f"model.layers.{index}.{name}"] = (f"model.layers.{index}.{places[name].tensor}", linear)
    return found


def make_plan(
    checkpoint: Checkpoint,
    stack: TextStack,
    group_size: int,
    dtype: torch.dtype,
    rows: Rows,
    max_memory: int | None = None,
    quality: str = DEFAULT_QUALITY,
    keeps_grid: bool = False,
    processes: int = 1,
    unsampled: OwnRows | None = None,
) -> Plan:
    """Return the plan of a quantization on `rows` that fits `max_memory` bytes. Raises if there is none.

    unsampled: those of `rows` that the model has yet to write.

    On a GPU with its own memory it is that memory which is planned, and it must fit the GPU too. It must not depend on
    what other programs use there, because sums depend on the plan.
    """
    layouts, effort = layers_of(checkpoint.facts, checkpoint.family), QUALITIES[quality].effort
    work = Workload(
        layouts,
        checkpoint.vocabulary,
        int(checkpoint.facts.hidden_size),
        rows.ids.numel(),
        rows.heldout.numel(),
        rows.ids.shape[1],
        group_size,
        2 if multiplies_bfloat16(stack.device) else FLOAT32,
        effort,
        keeps_grid,
        1 if checkpoint.shape.altup is None else checkpoint.shape.altup.streams,
        stack.device.type != "cpu",
        0 if unsampled is None else unsampled.tokens,
    )
    device_total = device_memory(stack.device)
    limits = [limit for limit in (max_memory, device_total) if limit is not None]
    fit, planned, smaller = _choose_fit(work, limits, device_total)
    linears = quantized_linears(layouts)
    tensors = _planned_tensors(checkpoint, stack, linears, group_size, dtype)
    states = effort.paths * work.calibration_tokens + 2 * work.heldout_tokens  # that travel through the layers
    disk = state_bytes(checkpoint.shape, states) + information_disk_bytes(work)
    if processes > 1 and not work.layers_depend:
        # each has the calibration rows once more, and the layers lie in files of their own first
        disk += processes * state_bytes(checkpoint.shape, work.calibration_tokens)
        disk += sum(tensor.nbytes for tensor in tensors)
    shares_rows = processes > 1 and work.layers_depend
    held = state_bytes(checkpoint.shape, -(-states // processes) if shares_rows else states)
    # it changes no sum, so it may depend on what other programs use
    free = free_memory(stack.device)
    holds = device_total is not None and all(planned + held <= limit for limit in (*limits, free) if limit is not None)
    held = held if holds else 0
    sampling = 0
    if unsampled is not None:
        sampling = sampling_bytes(layouts, work.vocabulary, checkpoint.nbytes, unsampled)
    return Plan(
        layouts=layouts,
        quantized_linears=len(linears),
        group_size=group_size,
        dtype=dtype,
        tensors=tensors,
        source_bytes=checkpoint.nbytes,
        artifact_bytes=sum(tensor.nbytes for tensor in tensors),
        fit=fit,
        rows_per_batch=max(1, fit.tokens_per_batch // max(1, work.seq_len)),
        memory_bytes=(
            max(planned, LIBRARY_BYTES + sampling)
            if device_total is None
            else host_peak_bytes(work) + held // STATE_FILES
        ),
        device_bytes=None if device_total is None else max(planned + held, CONTEXT_BYTES + sampling),
        smaller=smaller,
        state_bytes=disk,
        seconds=None if work.on_gpu else seconds(work, fit, flops_per_second(), processes),
        effort=effort,
        keeps_grid=keeps_grid,
        processes=processes,
        shares_rows=shares_rows,
        holds_states=holds,
        feedback_tokens=work.information_rows,
    )


def leave_in_16_bits(plan: Plan, checkpoint: Checkpoint, stack: TextStack, left: tuple[LeftGroup, ...]) -> Plan:
    """Return the plan of the same quantization with some groups of linears in 16 bits."""
    linears = quantized_linears(plan.layouts)
    for name in (name for group in left for name in group.modules):
        del linears[name]
    tensors = _planned_tensors(checkpoint, stack, linears, plan.group_size, plan.dtype)
    return replace(
        plan,
        quantized_linears=len(linears),
        tensors=tensors,
        artifact_bytes=sum(tensor.nbytes for tensor in tensors),
        left=left,
    )


def fitting_group_sizes(layouts: tuple[LayerLayout, ...]) -> list[int]:
    """Return the group sizes that divide the inputs of every linear, in the order of `GROUP_SIZES`."""
    inputs = {linear.inputs for _, linear in quantized_linears(layouts).values()}
    return [size for size in GROUP_SIZES if all(width % size == 0 for width in inputs)]


def _choose_fit(work: Workload, limits: Sequence[int], device_total: int | None) -> tuple[Fit, int, int | None]:
    """The first fit that is within all limits, its memory, and that of the next much smaller one.

    device_total: the memory of a GPU that has its own, which is planned then.
    """
    peak = peak_bytes if device_total is None else device_peak_bytes
    choices = [(fit, peak(work, fit)) for fit in (FITS if work.on_gpu else CPU_FITS)]
    fitting = [choice for choice in choices if all(choice[1] <= limit for limit in limits)]
    if not fitting:
        least = min(memory for _, memory in choices)
        if device_total is not None and least > device_total:
            raise GemmaAwqError(
                f"This needs at least {least / 1e9:.1f} GB of GPU memory, and this GPU has {device_total / 1e9:.1f} "
                "GB.",
                "Use shorter rows (--seq-len), or --device cpu.",
            )
        raise GemmaAwqError(
            f"This needs at least {least / 1e9:.1f} GB of memory, more than --max-memory allows.",
            "Raise --max-memory, or use shorter rows (--seq-len).",
        )
    fit, memory = fitting[0]
    smaller = max((other for _, other in choices if other < MUCH_SMALLER * memory), default=None)
    return fit, memory, smaller


def _planned_tensors(
    checkpoint: Checkpoint,
    stack: TextStack,
    linears: Mapping[str, tuple[str, Linear]],
    group_size: int,
    dtype: torch.dtype,
) -> tuple[PlannedTensor, ...]:
    """Every tensor of the artifact, in the order of the model, and then the companions."""
    held: dict[str, dict[str, Linear]] = {}
    for name, (tensor, linear) in linears.items():
        held.setdefault(tensor, {})[name] = linear
    tensors: list[PlannedTensor] = []
    for name, shape in stack.shapes.items():
        if name not in held:
            tensors.append(PlannedTensor(checkpoint.artifact_key(name), dtype, tuple(shape)))
        for own, linear in held.get(name, {}).items():
            base, groups, packed = checkpoint.artifact_key(own), linear.inputs // group_size, linear.outputs // PACK
            tensors += (
                PlannedTensor(f"{base}.qweight", torch.int32, (linear.inputs, packed)),
                PlannedTensor(f"{base}.qzeros", torch.int32, (groups, packed)),
                PlannedTensor(f"{base}.scales", torch.float16, (groups, linear.outputs)),
            )
    companions = ((key, checkpoint.tensors[key]) for key in checkpoint.companions())
    return (*tensors, *(PlannedTensor(key, info.dtype, info.shape) for key, info in companions))
