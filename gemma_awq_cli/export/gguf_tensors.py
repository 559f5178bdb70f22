"""The tensors of a GGUF file, planned from a checkpoint: names, shapes, ggml's types, and what their weights are."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch

from gemma_awq_cli.awq.packing import PackedWeight, unpack_columns
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.export import llama_cpp_names as names
from gemma_awq_cli.export.ggml_blocks import BLOCK
from gemma_awq_cli.export.source_parts import HEAD_MODULE, SourcePart, source_parts
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.expected_tensors import EMBEDDING, FINAL_NORM, HEAD
from gemma_awq_cli.models.gemma.architecture import PER_LAYER_NORM, PER_LAYER_PROJECTION, PER_LAYER_TABLE
from gemma_awq_cli.models.gemma.layers import DOWN, GATE_UP, LayerLayout, Linear

# ggml's types that are written: weights per block, bytes per block.
TYPES: Mapping[str, tuple[int, int]] = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q8_0": (32, 34), "Q6_K": (256, 210), "Q5_0": (32, 22),
    "Q4_1": (32, 20), "Q4_0": (32, 18),
}  # fmt: skip
STORED_AS = {torch.bfloat16: "BF16", torch.float16: "F16"}  # other dtypes as F32


@dataclass(frozen=True)
class Packed:
    """4-bit linears of the checkpoint, their rows one after another."""

    linears: Mapping[str, Linear]


@dataclass(frozen=True)
class Stored:
    """Tensors of the checkpoint, their rows one after another, to which `add` is added."""

    keys: tuple[str, ...]
    add: float = 0.0


@dataclass(frozen=True)
class Given:
    """Numbers that follow from the config. Fewer than the tensor has are repeated."""

    values: tuple[float, ...]


@dataclass(frozen=True)
class GgufTensor:
    """shape: as torch has it; a row is its last dimension. kind: one of `TYPES`."""

    name: str
    shape: tuple[int, ...]
    kind: str
    source: Packed | Stored | Given

    @property
    def row_bytes(self) -> int:
        weights, size = TYPES[self.kind]
        return self.shape[-1] // weights * size

    @property
    def nbytes(self) -> int:
        return prod(self.shape[:-1]) * self.row_bytes


Parts = dict[str, tuple[GgufTensor, ...]]


def gguf_parts(checkpoint: Checkpoint, architecture: str, compact: bool, head: str) -> Parts:
    """Return the tensors of each part of the checkpoint, in the order of the file.

    Raises GemmaAwqError for scales that float16 does not hold.
    """
    planner = _Planner(checkpoint, architecture, compact, head)
    return {part.name: tuple(planner.tensors(part)) for part in source_parts(checkpoint)}


class _Planner:
    def __init__(self, checkpoint: Checkpoint, architecture: str, compact: bool, head: str) -> None:
        self._checkpoint, self._compact = checkpoint, compact
        self._architecture = architecture
        self._head = head.upper() if head != "bf16" else None
        self._gain = float(checkpoint.family.gain_offset)

    def tensors(self, part: SourcePart) -> Iterator[GgufTensor]:
        if part.layer is not None:
            yield from self._layer(part.layer, part)
        elif EMBEDDING in part.kept:
            yield self._table(names.EMBEDDING, EMBEDDING)
        else:
            yield from self._rest(part)

    def _layer(self, index: int, part: SourcePart) -> Iterator[GgufTensor]:
        layout, prefix, block = self._checkpoint.shape.layouts[index], f"model.layers.{index}.", f"blk.{index}."
        kinds = self._kinds(part)
        for slot, norm in layout.norms.items():
            yield self._norm(f"{block}{names.NORMS[slot]}.weight", f"{prefix}{norm.name}.weight", norm.size)
        for name, linear in layout.linears.items():
            own, theirs = prefix + name, f"{block}{names.LINEARS[name]}.weight"
            shape: tuple[int, ...] = (linear.outputs, linear.inputs)
            if own in part.packed:
                yield GgufTensor(theirs, shape, kinds[own], Packed({own: linear}))
            else:
                yield self._kept(theirs, (f"{own}.weight",), shape)
        yield from self._experts(block, prefix, layout, kinds)
        for name, shape in layout.kept.items():
            yield self._kept(block + names.KEPT[name], (prefix + name,), shape)
        if self._architecture == "gemma3n" and layout.kv_source is not None:
            yield from _unread(block, layout, self._checkpoint.shape.layouts[layout.kv_source])

    def _experts(self, block: str, prefix: str, layout: LayerLayout, kinds: Mapping[str, str]) -> Iterator[GgufTensor]:
        if layout.experts is None:
            return
        linears = {prefix + n: one for e in range(layout.experts.count) for n, one in layout.experts.linears(e).items()}
        down = {name: one for name, one in linears.items() if name.endswith("down_proj")}
        gate_up = {name: one for name, one in linears.items() if name not in down}
        shapes = layout.experts.stacked()
        for theirs, own, of_it in ((names.GATE_UP_EXPERTS, GATE_UP, gate_up), (names.DOWN_EXPERTS, DOWN, down)):
            if of_it.keys() <= kinds.keys():
                yield GgufTensor(block + theirs, shapes[own], _common(kinds[name] for name in of_it), Packed(of_it))
            else:
                yield self._kept(block + theirs, (prefix + own,), shapes[own])

    def _rest(self, part: SourcePart) -> Iterator[GgufTensor]:
        shape = self._checkpoint.shape
        yield self._norm(names.FINAL_NORM, FINAL_NORM, shape.hidden)
        if HEAD in part.kept:
            yield self._table(names.HEAD, HEAD)
        if (head := part.packed.get(HEAD_MODULE)) is not None:
            kind = self._kinds(part)[HEAD_MODULE]
            yield GgufTensor(names.HEAD, (head.outputs, head.inputs), kind, Packed({HEAD_MODULE: head}))
        if shape.per_layer is not None:
            yield self._table(names.PER_LAYER_TABLE, PER_LAYER_TABLE)
            yield self._kept(names.PER_LAYER_PROJECTION, (PER_LAYER_PROJECTION,), part.kept[PER_LAYER_PROJECTION])
            yield self._norm(names.PER_LAYER_NORM, PER_LAYER_NORM, shape.per_layer.width)
        if shape.altup is not None:
            streams = range(shape.altup.streams - 1)
            stacked = (len(streams), shape.hidden, shape.hidden)
            for name, module in ((names.ALTUP_PROJECTIONS, "altup_projections"),
                                 (names.ALTUP_UNEMBED, "altup_unembed_projections")):  # fmt: skip
                yield self._kept(name, tuple(f"model.{module}.{i}.weight" for i in streams), stacked)
        if (factors := rope_factors(shape.layouts)) is not None:
            yield GgufTensor(names.ROPE_FACTORS, (len(factors),), "F32", Given(factors))

    def _table(self, name: str, key: str) -> GgufTensor:
        info = self._checkpoint.tensors[self._checkpoint.key(key)]
        shape = (self._checkpoint.vocabulary, info.shape[1])
        return GgufTensor(name, shape, self._head or STORED_AS.get(info.dtype, "F32"), Stored((key,)))

    def _norm(self, name: str, key: str, size: int) -> GgufTensor:
        return GgufTensor(name, (size,), "F32", Stored((key,), self._gain))

    def _kept(self, name: str, keys: tuple[str, ...], shape: tuple[int, ...]) -> GgufTensor:
        dtype = self._checkpoint.tensors[self._checkpoint.key(keys[0])].dtype
        whole = len(shape) == 1 or name.endswith(names.FLOAT32)
        return GgufTensor(name, shape, "F32" if whole else STORED_AS.get(dtype, "F32"), Stored(keys))

    def _kinds(self, part: SourcePart) -> dict[str, str]:
        """Return the type of every packed linear. Reads scales and zero points."""
        kinds = {}
        for name, packed in self._checkpoint.read_packed(part.packed).items():
            _require_float16(name, packed)
            zero = unpack_columns(packed.qzeros)
            # Around a zero point of 7 or 8, all integers fit the 16 levels of Q4_0.
            symmetric = bool(((zero == 7) | (zero == 8)).all())
            kinds[name] = "Q4_0" if symmetric else "Q4_1" if self._compact else "Q5_0"
        return kinds


def _common(kinds: Iterable[str]) -> str:
    """Return the type that one tensor of all these linears can have: every linear of a narrower one fits it."""
    wanted = {*kinds}
    return next(kind for kind in ("Q5_0", "Q4_1", "Q4_0") if kind in wanted)


def _unread(block: str, layout: LayerLayout, source: LayerLayout) -> Iterator[GgufTensor]:
    """Zeros for keys and values that a layer does not have: llama.cpp's Gemma 3n asks for them and never reads them."""
    for name in ("attn_k", "attn_v"):
        yield GgufTensor(f"{block}{name}.weight", (source.kv_size, layout.hidden), "Q4_0", Given((0.0,)))
    yield GgufTensor(f"{block}attn_k_norm.weight", (layout.head_dim,), "F32", Given((0.0,)))


def rope_factors(layouts: tuple[LayerLayout, ...]) -> tuple[float, ...] | None:
    """Return what the frequencies of the full layers are divided by, if only some of their channels rotate.

    llama.cpp's frequencies have no zeros, so those of the channels that do not rotate are divided by 1e30.
    """
    for layout in layouts:
        if layout.rope["rope_type"] == "proportional":
            pairs = layout.head_dim // 2
            rotated = int(layout.head_dim * float(layout.rope.get("partial_rotary_factor", 1.0)) / 2)
            return (1.0,) * rotated + (1e30,) * (pairs - rotated)
    return None


def _require_float16(name: str, packed: PackedWeight) -> None:
    if packed.scales.dtype == torch.float16:
        return
    half = packed.scales.to(torch.float16)
    if not torch.equal(half.to(packed.scales.dtype), packed.scales):
        raise GemmaAwqError(
            f"{name} has scales that float16 does not hold exactly, and the blocks of gguf have no other.",
            "Export to a format with float32 scales or weights in its place.",
        )


def size_refusal(checkpoint: Checkpoint, head: str) -> str | None:
    """Why the checkpoint's sizes do not fit ggml's blocks, as a clause, or None."""
    group_size = checkpoint.group_size
    if group_size is None or group_size % BLOCK:
        return f"a block holds {BLOCK} weights with one scale, and its groups have {group_size}"
    for layout in checkpoint.shape.layouts:
        for name, linear in layout.packed().items():
            if linear.inputs % BLOCK:
                return f"a block holds {BLOCK} weights of a row, and {name} has rows of {linear.inputs}"
    widths = {"the embedding": checkpoint.shape.hidden}
    if checkpoint.shape.per_layer is not None:
        widths["the per-layer embedding"] = checkpoint.shape.layers * checkpoint.shape.per_layer.width
    for what, width in widths.items():
        if head != "bf16" and width % (block := TYPES[head.upper()][0]):
            fits = "q8_0" if width % TYPES["Q8_0"][0] == 0 else "bf16"
            return f"{head} has blocks of {block} weights, and {what} has rows of {width}: use --head {fits}"
    return None


def kinds_of(parts: Parts) -> list[str]:
    """Return the types of the packed linears, the most frequent first."""
    weights: dict[str, int] = {}
    for tensors in parts.values():
        for tensor in tensors:
            if isinstance(tensor.source, Packed):
                weights[tensor.kind] = weights.get(tensor.kind, 0) + prod(tensor.shape)
    return sorted(weights, key=lambda kind: -weights[kind])
