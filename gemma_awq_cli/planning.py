"""What quantizing a checkpoint will write, need and take, from its headers alone."""

from dataclasses import dataclass

import torch

from gemma_awq_cli.awq.gram import block_width
from gemma_awq_cli.awq.pack import PACK
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.families import FLOAT16_REASON
from gemma_awq_cli.layer_quantizing import GRAM_LIMIT
from gemma_awq_cli.models.checkpoint import Checkpoint
from gemma_awq_cli.models.stack import TextStack
from gemma_awq_cli.models.writing import PlannedTensor

DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
# What this kind of work reaches on two CPU cores, for the estimate only: fp32-accurate products and everything else.
ESTIMATED_FLOPS = 1.5e11


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
    memory_bytes: int
    seconds: float


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


def make_plan(
    checkpoint: Checkpoint, stack: TextStack, group_size: int, dtype: torch.dtype, rows: int, seq_len: int
) -> Plan:
    """The plan of one quantization; an error if the group size or the layout does not fit a dimension."""
    linears = {f"{linear}.weight" for group in checkpoint.family.groups for linear in group.linears}
    tensors: list[PlannedTensor] = []
    quantized = 0
    for name, shape in stack.shapes.items():
        key = checkpoint.key(name)
        if name.split(".", 3)[-1] in linears and name.startswith("model.layers."):
            out_features, in_features = shape
            _require_divisible(name, in_features, out_features, group_size)
            base = key.removesuffix(".weight")
            groups = in_features // group_size
            tensors.append(PlannedTensor(f"{base}.qweight", torch.int32, (in_features, out_features // PACK)))
            tensors.append(PlannedTensor(f"{base}.qzeros", torch.int32, (groups, out_features // PACK)))
            tensors.append(PlannedTensor(f"{base}.scales", torch.float16, (groups, out_features)))
            quantized += 1
        else:
            tensors.append(PlannedTensor(key, dtype, tuple(shape)))
    for key in checkpoint.companions():
        info = checkpoint.tensors[key]
        tensors.append(PlannedTensor(key, info.dtype, info.shape))
    return Plan(
        layers=checkpoint.layers,
        quantized_linears=quantized,
        group_size=group_size,
        dtype=dtype,
        tensors=tuple(tensors),
        source_bytes=sum(info.nbytes for info in checkpoint.tensors.values()),
        artifact_bytes=sum(tensor.nbytes for tensor in tensors),
        memory_bytes=_memory(checkpoint, stack, group_size, rows, seq_len),
        seconds=_seconds(checkpoint, stack, group_size, rows * seq_len),
    )


def _require_divisible(name: str, in_features: int, out_features: int, group_size: int) -> None:
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


def _widths(checkpoint: Checkpoint, stack: TextStack) -> list[tuple[int, int]]:
    """(inputs, summed outputs) of each group of linears in a layer."""
    return [
        (
            stack.shapes[f"model.layers.0.{group.linears[0]}.weight"][1],
            sum(stack.shapes[f"model.layers.0.{linear}.weight"][0] for linear in group.linears),
        )
        for group in checkpoint.family.groups
    ]


def _memory(checkpoint: Checkpoint, stack: TextStack, group_size: int, rows: int, seq_len: int) -> int:
    """Peak bytes: the libraries, the hidden states, a layer in several forms, its Gram matrices, a chunk of logits."""
    hidden = int(stack.config.hidden_size)
    layer = sum(s.numel() for n, s in stack.shapes.items() if n.startswith("model.layers.0.")) * 4
    grams = [block_width(k, group_size, GRAM_LIMIT) * k * 4 for k, _ in _widths(checkpoint, stack)]
    embedding = stack.shapes["model.embed_tokens.weight"].numel() * 2
    working = 4 * layer + sum(grams) + 4 * max(grams)
    logits = 4 * 128 * int(stack.config.vocab_size) * 4
    return 450_000_000 + embedding + 2 * rows * seq_len * hidden * 4 + max(working, logits)


def _seconds(checkpoint: Checkpoint, stack: TextStack, group_size: int, tokens: int) -> float:
    flops = 0.0
    for k, n in _widths(checkpoint, stack):
        block = block_width(k, group_size, GRAM_LIMIT)
        flops += 2 * tokens * k * n + 2 * tokens * k * block  # the forward, the Gram matrix
        flops += 40 * 2 * n * k * block + 4 * k * block * block + 2 * n * k * block  # search, factor, rounding
    return 20 + checkpoint.layers * flops / ESTIMATED_FLOPS
