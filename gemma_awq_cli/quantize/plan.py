"""What quantizing a checkpoint will write, need and take, from its headers alone."""

from dataclasses import dataclass

import torch

from gemma_awq_cli.awq.gram import block_width
from gemma_awq_cli.awq.packing import PACK
from gemma_awq_cli.awq.round_group import PART
from gemma_awq_cli.awq.search import BALANCED, BEST, FAST, RATIOS, Effort
from gemma_awq_cli.calibration_text.rows import Rows
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.writing import PlannedTensor
from gemma_awq_cli.models.forward.layerwise import LOGIT_CHUNK, TextStack
from gemma_awq_cli.models.gemma.families import FLOAT16_REASON
from gemma_awq_cli.quantize.input_statistics import multiplies_bfloat16

DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
# What this work reaches on two CPU cores with AVX-512, in products and in single operations; for the estimate only.
ESTIMATED_FLOPS = 2.5e11
ESTIMATED_ELEMENTS = 1.5e9
# torch, transformers and the tokenizer of 262144 entries, before any weight
LIBRARY_BYTES = 700_000_000


EFFORTS = {"fast": FAST, "balanced": BALANCED, "best": BEST}
BEST_OWN_ROWS = 32  # rows of the model's own that `best` adds to the text's


@dataclass(frozen=True)
class Fit:
    """What trades memory for speed or reach. gram_limit: inputs wider than this keep their Gram matrix in blocks."""

    tokens_per_batch: int
    gram_limit: int


FITS = tuple(
    Fit(tokens, limit) for limit in (8192, 4096, 2048, 1024) for tokens in (4096, 2048, 1024, 512) if tokens <= limit
)


@dataclass(frozen=True)
class Plan:
    """What will be done. Sizes in bytes."""

    layers: int
    quantized_linears: int
    group_size: int
    dtype: torch.dtype
    tensors: tuple[PlannedTensor, ...]
    source_bytes: int
    artifact_bytes: int
    fit: Fit
    rows_per_batch: int
    memory_bytes: int
    smaller: int | None  # the memory of the next smaller fit
    state_bytes: int  # on the disk, while the work goes on
    seconds: float
    effort: Effort


def stored_dtype(checkpoint: Checkpoint, asked: str | None) -> torch.dtype:
    """The dtype of what stays 16-bit: as asked, else as the source declares (bfloat16 for a 32-bit source)."""
    declared = checkpoint.declared_dtype
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}[asked] if asked else declared
    if dtype == torch.float16 and not checkpoint.family.float16:
        if asked:
            raise GemmaAwqError(
                f"float16 is not possible for {checkpoint.family.title}: {FLOAT16_REASON}.", "Use --dtype bfloat16."
            )
        return torch.bfloat16
    return dtype if dtype in DTYPE_NAMES else torch.bfloat16


def require_layout(checkpoint: Checkpoint, stack: TextStack, group_size: int) -> None:
    """An error if the group size or the packed layout does not fit a dimension of a linear."""
    linears = _linear_names(checkpoint, stack)
    for name in (name for name in stack.shapes if name in linears):  # in the model's order, not a set's
        out_features, in_features = stack.shapes[name]
        if in_features % group_size:
            fits = [size for size in (128, 64, 32) if in_features % size == 0]
            raise GemmaAwqError(
                f"Group size {group_size} does not divide the {in_features} inputs of {name}.",
                f"Use --group-size {fits[0]}." if fits else "No group size of this layout divides it.",
            )
        if out_features % PACK:
            raise GemmaAwqError(
                f"{name} has {out_features} outputs, and the AutoAWQ layout needs a multiple of {PACK}.",
                "This model cannot be stored in this layout.",
            )


def _linear_names(checkpoint: Checkpoint, stack: TextStack) -> set[str]:
    """The weights that become 4-bit, by their names in the model."""
    linears = {f"{linear}.weight" for group in checkpoint.family.groups for linear in group.linears}
    return {name for name in stack.shapes if name.startswith("model.layers.") and name.split(".", 3)[-1] in linears}


def make_plan(
    checkpoint: Checkpoint,
    stack: TextStack,
    group_size: int,
    dtype: torch.dtype,
    rows: Rows,
    max_memory: int | None = None,
    quality: str = "balanced",
) -> Plan:
    """The plan of one quantization on `rows`, in at most `max_memory` bytes; an error if that is not possible."""
    effort = EFFORTS[quality]
    choices = [(fit, _memory(checkpoint, stack, group_size, rows, fit, effort)) for fit in FITS]
    fitting = [choice for choice in choices if max_memory is None or choice[1] <= max_memory]
    least = min(memory for _, memory in choices)
    if not fitting:
        raise GemmaAwqError(
            f"This needs at least {least / 1e9:.1f} GB of memory, more than --max-memory allows.",
            "Allow more, or use shorter rows (--seq-len).",
        )
    fit, memory = fitting[0]
    tokens = effort.paths * rows.ids.numel() + 2 * rows.heldout.numel()  # that travel
    linears = _linear_names(checkpoint, stack)
    tensors: list[PlannedTensor] = []
    for name, shape in stack.shapes.items():
        key = checkpoint.artifact_key(name)
        if name in linears:
            out_features, in_features = shape
            base = key.removesuffix(".weight")
            groups = in_features // group_size
            tensors.append(PlannedTensor(f"{base}.qweight", torch.int32, (in_features, out_features // PACK)))
            tensors.append(PlannedTensor(f"{base}.qzeros", torch.int32, (groups, out_features // PACK)))
            tensors.append(PlannedTensor(f"{base}.scales", torch.float16, (groups, out_features)))
        else:
            tensors.append(PlannedTensor(key, dtype, tuple(shape)))
    for key in checkpoint.companions():
        info = checkpoint.tensors[key]
        tensors.append(PlannedTensor(key, info.dtype, info.shape))
    return Plan(
        layers=checkpoint.layers,
        quantized_linears=len(linears),
        group_size=group_size,
        dtype=dtype,
        tensors=tuple(tensors),
        source_bytes=sum(info.nbytes for info in checkpoint.tensors.values()),
        artifact_bytes=sum(tensor.nbytes for tensor in tensors),
        fit=fit,
        rows_per_batch=max(1, fit.tokens_per_batch // max(1, rows.ids.shape[1])),
        memory_bytes=memory,
        smaller=max((other for _, other in choices if other < 0.9 * memory), default=None),
        state_bytes=2 * tokens * int(stack.config.hidden_size) * 4,
        seconds=_seconds(checkpoint, stack, group_size, rows, fit, effort),
        effort=effort,
    )


def _widths(checkpoint: Checkpoint, stack: TextStack) -> list[tuple[int, int]]:
    """(inputs, summed outputs) of each group of linears in a layer."""
    return [
        (
            stack.shapes[f"model.layers.0.{group.linears[0]}.weight"][1],
            sum(stack.shapes[f"model.layers.0.{linear}.weight"][0] for linear in group.linears),
        )
        for group in checkpoint.family.groups
    ]


def _memory(checkpoint: Checkpoint, stack: TextStack, group_size: int, rows: Rows, fit: Fit, effort: Effort) -> int:
    """Peak bytes: the largest of the stages a layer goes through, and of the comparison at the end."""
    config = stack.config
    widths = _widths(checkpoint, stack)
    length = rows.ids.shape[1]
    layer = sum(s.numel() for n, s in stack.shapes.items() if n.startswith("model.layers.0."))
    tokens = max(fit.tokens_per_batch, effort.paths * length)  # a row and its disturbed copy
    blocks = [block_width(k, group_size, fit.gram_limit) for k, _ in widths]
    grams = [effort.paths * block * k * 4 for block, (k, _) in zip(blocks, widths, strict=True)]
    # an MLP holds its input, both projections, their product and its weighted copy, of the held-out rows in float32
    wide = max(tokens * (2 if multiplies_bfloat16(stack.device) else 4), min(tokens, rows.heldout.numel()) * 4)
    activations = tokens * 4 * 8 * int(config.hidden_size) + wide * 5 * max(k for k, _ in widths)
    scores = max(1, tokens // length) * int(config.num_attention_heads) * length * length * 4
    observing = 6 * layer + sum(grams) + activations + scores
    # a group's weights in float32, its integers by compensation and to nearest; of one block the scaled Gram and its
    # factor in float64; and what the rounding of some rows of it takes
    rounding = 0
    for block, (k, n) in zip(blocks, widths, strict=True):
        own = 6 * k * n + 28 * block * block + 32 * min(n * block, PART)
        rounding = max(rounding, 3 * layer + sum(grams) + own)
    vocabulary = stack.shapes["model.embed_tokens.weight"]
    comparing = 2 * vocabulary.numel() + rows.heldout.numel() * 4 * (8 * LOGIT_CHUNK + 4 * vocabulary[1])
    return LIBRARY_BYTES + max(observing, rounding, comparing)


def _seconds(checkpoint: Checkpoint, stack: TextStack, group_size: int, rows: Rows, fit: Fit, effort: Effort) -> float:
    tokens = (3 if effort.correction else 1) * rows.ids.numel() + 2 * rows.heldout.numel()
    flops = elements = 0.0
    tries = 10 * (2 * RATIOS / effort.stride + effort.descent)  # ten operations each
    for group, (k, n) in zip(checkpoint.family.groups, _widths(checkpoint, stack), strict=True):
        block = block_width(k, group_size, fit.gram_limit)
        flops += 2 * tokens * k * n + 2 * rows.ids.numel() * k * block  # the forward, the Gram matrix
        flops += k * block * block + 6 * n * k * block  # two factors, the rounding
        if effort.correction:
            flops += 4 * rows.ids.numel() * k * block + k * block * block + 6 * n * k * block
        flops += effort.refinements * (12 + 4 * effort.sweeps) * n * k * block
        elements += tries * min(n, effort.rows * len(group.linears)) * k + 10 * len(effort.shrinks) * n * k
    head = 4.0 * rows.heldout.numel() * stack.shapes["model.embed_tokens.weight"].numel()
    layers = checkpoint.layers
    return 5 + (layers * flops + head) / ESTIMATED_FLOPS + layers * elements / ESTIMATED_ELEMENTS
