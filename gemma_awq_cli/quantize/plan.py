"""The plan of a quantization: the tensors that will be written, and the memory and time that it needs.

It reads the headers of a checkpoint and no weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from gemma_awq_cli.awq.group_sizes import GROUP_SIZES
from gemma_awq_cli.awq.packing import PACK
from gemma_awq_cli.awq.search import Effort
from gemma_awq_cli.calibration_text.rows import Rows
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.writing import PlannedTensor
from gemma_awq_cli.models.forward.hidden_states import state_bytes
from gemma_awq_cli.models.forward.layerwise import TextStack
from gemma_awq_cli.models.gemma.families import FLOAT16_REASON
from gemma_awq_cli.models.gemma.layers import LayerLayout, Linear, layers_of
from gemma_awq_cli.quantize.estimates import FLOAT32, Fit, Workload, peak_bytes, seconds
from gemma_awq_cli.quantize.input_statistics import multiplies_bfloat16
from gemma_awq_cli.quantize.quality import DEFAULT_QUALITY, QUALITIES

DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
FITS = tuple(
    Fit(tokens, limit) for limit in (8192, 4096, 2048, 1024) for tokens in (4096, 2048, 1024, 512) if tokens <= limit
)
MUCH_SMALLER = 0.9  # the share of a plan's memory below which another plan is worth suggesting


@dataclass(frozen=True)
class Plan:
    """What a quantization will do. Sizes are in bytes.

    layouts: one per layer; tensors: all that the artifact will hold; smaller: the memory of the next smaller fit, if
    there is one; state_bytes: on the disk while the work goes on.
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
    smaller: int | None
    state_bytes: int
    seconds: float
    effort: Effort

    @property
    def layers(self) -> int:
        return len(self.layouts)

    @property
    def dtype_name(self) -> str:
        return DTYPE_NAMES[self.dtype]


def stored_dtype(checkpoint: Checkpoint, asked: str | None) -> torch.dtype:
    """Return the dtype of the weights that stay in 16 bits.

    It is the one that is asked for, else the one that the checkpoint declares, and bfloat16 for a 32-bit checkpoint.
    """
    declared = checkpoint.declared_dtype
    dtype = {name: dtype for dtype, name in DTYPE_NAMES.items()}[asked] if asked else declared
    if dtype == torch.float16 and not checkpoint.family.float16:
        if asked:
            raise GemmaAwqError(
                f"float16 is not possible for {checkpoint.family.title}: {FLOAT16_REASON}.", "Use --dtype bfloat16."
            )
        return torch.bfloat16
    return dtype if dtype in DTYPE_NAMES else torch.bfloat16


def require_layout(checkpoint: Checkpoint, group_size: int) -> None:
    """Raise if the group size or the packed layout does not fit a dimension of a linear."""
    for name, linear in _quantized_linears(layers_of(checkpoint.facts, checkpoint.family)).items():
        if linear.inputs % group_size:
            fits = [size for size in GROUP_SIZES if linear.inputs % size == 0]
            raise GemmaAwqError(
                f"Group size {group_size} does not divide the {linear.inputs} inputs of {name}.",
                f"Use --group-size {fits[0]}."
                if fits
                else "This model cannot be stored in the AutoAWQ layout: no group size divides them.",
            )
        if linear.outputs % PACK:
            raise GemmaAwqError(
                f"{name} has {linear.outputs} outputs, and the AutoAWQ layout needs a multiple of {PACK}.",
                "This model cannot be stored in the AutoAWQ layout.",
            )


def _quantized_linears(layouts: tuple[LayerLayout, ...]) -> dict[str, Linear]:
    """The linears that become 4-bit, by the names of their weights, in the order of the model."""
    return {
        f"model.layers.{index}.{name}.weight": layout.linears[name]
        for index, layout in enumerate(layouts)
        for group in layout.groups
        for name in group.linears
    }


def make_plan(
    checkpoint: Checkpoint,
    stack: TextStack,
    group_size: int,
    dtype: torch.dtype,
    rows: Rows,
    max_memory: int | None = None,
    quality: str = DEFAULT_QUALITY,
) -> Plan:
    """Return the plan of a quantization on `rows` that fits `max_memory` bytes. Raises if there is none."""
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
        streams=1 if checkpoint.shape.altup is None else checkpoint.shape.altup.streams,
    )
    fit, memory, smaller = _choose_fit(work, max_memory)
    linears = _quantized_linears(layouts)
    tensors = _planned_tensors(checkpoint, stack, linears, group_size, dtype)
    states = effort.paths * work.calibration_tokens + 2 * work.heldout_tokens  # that travel through the layers
    return Plan(
        layouts=layouts,
        quantized_linears=len(linears),
        group_size=group_size,
        dtype=dtype,
        tensors=tensors,
        source_bytes=sum(info.nbytes for info in checkpoint.tensors.values()),
        artifact_bytes=sum(tensor.nbytes for tensor in tensors),
        fit=fit,
        rows_per_batch=max(1, fit.tokens_per_batch // max(1, work.seq_len)),
        memory_bytes=memory,
        smaller=smaller,
        state_bytes=state_bytes(checkpoint.shape, states),
        seconds=seconds(work, fit),
        effort=effort,
    )


def _choose_fit(work: Workload, max_memory: int | None) -> tuple[Fit, int, int | None]:
    """The first fit that is within `max_memory`, its memory, and that of the next much smaller one."""
    choices = [(fit, peak_bytes(work, fit)) for fit in FITS]
    fitting = [choice for choice in choices if max_memory is None or choice[1] <= max_memory]
    if not fitting:
        least = min(memory for _, memory in choices)
        raise GemmaAwqError(
            f"This needs at least {least / 1e9:.1f} GB of memory, more than --max-memory allows.",
            "Raise --max-memory, or use shorter rows (--seq-len).",
        )
    fit, memory = fitting[0]
    smaller = max((other for _, other in choices if other < MUCH_SMALLER * memory), default=None)
    return fit, memory, smaller


def _planned_tensors(
    checkpoint: Checkpoint, stack: TextStack, linears: Mapping[str, Linear], group_size: int, dtype: torch.dtype
) -> tuple[PlannedTensor, ...]:
    """Every tensor of the artifact, in the order of the model, and then the companions."""
    tensors: list[PlannedTensor] = []
    for name, shape in stack.shapes.items():
        key = checkpoint.artifact_key(name)
        if (linear := linears.get(name)) is None:
            tensors.append(PlannedTensor(key, dtype, tuple(shape)))
            continue
        base, groups, packed = key.removesuffix(".weight"), linear.inputs // group_size, linear.outputs // PACK
        tensors += (
            PlannedTensor(f"{base}.qweight", torch.int32, (linear.inputs, packed)),
            PlannedTensor(f"{base}.qzeros", torch.int32, (groups, packed)),
            PlannedTensor(f"{base}.scales", torch.float16, (groups, linear.outputs)),
        )
    companions = ((key, checkpoint.tensors[key]) for key in checkpoint.companions())
    return (*tensors, *(PlannedTensor(key, info.dtype, info.shape) for key, info in companions))
