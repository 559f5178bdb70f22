"""A conversion into safetensors files: the names, shapes and dtypes of another reader, written a part at a time.

What the formats differ in is data, a `TensorLayout`. Reading, writing, resuming and reading back are the same for all.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_awq_cli.awq.grid import dequantize
from gemma_awq_cli.awq.packed_arrays import PACK
from gemma_awq_cli.awq.packing import PackedWeight, unpack_weight
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.export.source_facts import group_size_of, scale_dtype
from gemma_awq_cli.export.source_parts import HEAD_MODULE, SourcePart, source_parts
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.expected_tensors import HEAD
from gemma_awq_cli.models.checkpoints.files import CONFIG
from gemma_awq_cli.models.checkpoints.headers import TensorInfo, find_weights, read_headers
from gemma_awq_cli.models.checkpoints.side_files import copy_side_files, side_files
from gemma_awq_cli.models.checkpoints.weight_files import read_pieces, read_tensors, require_finite
from gemma_awq_cli.models.checkpoints.writing import PlannedTensor, TensorWriter, write_json
from gemma_awq_cli.models.gemma.layers import Linear

COMPANIONS = "towers and embedders"
ZEROS = "tensors of zeros"
_BUG = "This is a bug: please report it."
_EXPERT = re.compile(r"(.*\.)experts\.(\d+)\.(gate|up|down)_proj")


@dataclass(frozen=True)
class Stack:
    """Linears whose tensors lie one after the other in one tensor of each kind.

    name: of these tensors in the causal model; `{kind}` in it stands for the kind. linears: in the order in which they
    lie there; experts: the tensors' first dimension, None for a single linear.
    """

    name: str
    linears: tuple[str, ...]
    experts: int | None = None


@dataclass(frozen=True)
class TensorLayout:
    """How a format holds a language model.

    form: what it is, in a few words. key: a name in the causal model -> the name in the file.
    stacks: a layer's packed linears -> the tensors that hold them.
    pack: a linear's tensors by their kinds. weight: the weight [N, K] float32 that these tensors are to the format's
    readers, by their definition of them. bound: how far it may be from the source's, in units of the scale; tolerance:
    why, as a sentence.
    config: the whole config.json. kept: the dtype of all other tensors; None: as the source stores them. companions:
    whether towers and embedders are copied. zeros: tensors that readers require and do not use.
    """

    form: str
    key: Callable[[str], str]
    stacks: Callable[[Sequence[str]], Sequence[Stack]]
    pack: Callable[[PackedWeight], dict[str, Tensor]]
    weight: Callable[[Mapping[str, Tensor]], Tensor]
    bound: float
    tolerance: str
    config: Mapping[str, Any]
    kept: torch.dtype | None = None
    companions: bool = True
    zeros: Sequence[PlannedTensor] = ()
    notes: Sequence[str] = ()


def renamed(name: str, prefix: str, head: str) -> str:
    """Return a name of the causal model with another beginning. head: of the module `lm_head`."""
    if name.startswith("model."):
        return prefix + name.removeprefix("model.")
    return head + name.removeprefix(HEAD_MODULE)


def artifact_names(checkpoint: Checkpoint) -> Callable[[str], str]:
    """Return the names that artifacts of this tool have, and that transformers and vLLM know."""
    prefix, head = (checkpoint.artifact_key(name) for name in ("model.", HEAD))
    return lambda name: renamed(name, prefix, head.removesuffix(".weight"))


def each_alone(linears: Sequence[str]) -> list[Stack]:
    """Every linear, an expert's too, in tensors of its own."""
    return [Stack(f"{name}.{{kind}}", (name,)) for name in linears]


def expert_counts(linears: Sequence[str]) -> dict[str, int]:
    """Return how many experts there are, by what the names of their linears begin with: `model.layers.0.`."""
    counts: dict[str, int] = {}
    for name in linears:
        if (found := _EXPERT.fullmatch(name)) is not None:
            counts[found[1]] = max(counts.get(found[1], 0), int(found[2]) + 1)
    return counts


def experts_stacked(linears: Sequence[str], tensors: Mapping[str, Sequence[str]]) -> list[Stack]:
    """Return every linear in tensors of its own, and the experts of a layer together.

    tensors: the name of each of the experts' tensors in the layer -> which linears of an expert it holds, in order.
    """
    stacks = each_alone([name for name in linears if _EXPERT.fullmatch(name) is None])
    for prefix, count in expert_counts(linears).items():
        for tensor, parts in tensors.items():
            held = tuple(f"{prefix}experts.{expert}.{part}" for expert in range(count) for part in parts)
            stacks.append(Stack(f"{prefix}{tensor}", held, count))
    return stacks


class SafetensorsConversion:
    """One checkpoint on its way into a folder of safetensors files: see `conversion.Conversion`."""

    def __init__(self, checkpoint: Checkpoint, layout: TensorLayout) -> None:
        self.form, self.tolerance, self.notes = layout.form, layout.tolerance, layout.notes
        self._checkpoint, self._layout = checkpoint, layout
        self._group_size = group_size_of(checkpoint)
        self._scale_dtype = scale_dtype(checkpoint)
        self._side_files = side_files(checkpoint.folder)
        self._parts = {part.name: part for part in source_parts(checkpoint)}
        self._companions = checkpoint.companions() if layout.companions else []
        ends = ((COMPANIONS, self._companions), (ZEROS, layout.zeros))
        self.parts: Sequence[str] = [*self._parts, *(name for name, tensors in ends if tensors)]
        self._shapes: dict[Linear, dict[str, tuple[torch.dtype, torch.Size]]] = {}
        self._plans = {name: list(self._plan(name)) for name in self.parts}
        self.nbytes = sum(tensor.nbytes for tensors in self._plans.values() for tensor in tensors)
        self._folder = Path()
        self._writer: TensorWriter
        self._written: set[str] = set()
        self._stored: Mapping[str, TensorInfo] = {}

    def begin(self, folder: Path, begun: bool) -> None:
        """Make the files in `folder`, or continue them."""
        self._folder = folder
        plan = [tensor for tensors in self._plans.values() for tensor in tensors]
        self._writer = TensorWriter(folder, plan, begun=begun)

    def write(self, part: str) -> None:
        """Write the tensors of one part, and make sure that they are on the disk."""
        if part == COMPANIONS:
            for key in self._companions:
                self._writer.write_pieces(key, read_pieces(key, self._checkpoint.tensors[key]))
        elif part == ZEROS:
            for planned in self._layout.zeros:
                self._writer.write(planned.name, torch.zeros(planned.shape, dtype=planned.dtype))
        else:
            self._write_tensors(self._parts[part])
        self._writer.sync()
        self._written.add(part)

    def finish(self) -> None:
        """Write config, tokenizer and licences, and make sure that nothing is missing."""
        for part in self.parts:
            if part not in self._written:  # by an earlier run
                self._writer.keep(tensor.name for tensor in self._plans[part])
        self._writer.finish()
        copy_side_files(self._side_files, self._folder)
        write_json(self._folder / CONFIG, self._layout.config)

    def verify(self, part: str) -> float:
        """Compare one part of the finished files with the source."""
        if not self._stored:
            self._stored = read_headers(find_weights(self._folder))
        for planned in self._plans[part]:
            found = self._stored.get(planned.name)
            if found is None or (found.dtype, found.shape) != (planned.dtype, planned.shape):
                raise GemmaAwqError(f"{self._folder} does not hold {planned.name} as it was planned.", _BUG)
        if part == ZEROS:
            return 0.0
        if part == COMPANIONS:
            for key in self._companions:
                self._require_same(key, read_pieces(key, self._checkpoint.tensors[key]))
            return 0.0
        source = self._parts[part]
        for name in source.kept:
            self._require_same(self._layout.key(name), self._kept(name))
        packed = self._read_packed(source)
        return max((self._compare(stack, source, packed) for stack in self._stacks(source)), default=0.0)

    def _plan(self, part: str) -> Iterable[PlannedTensor]:
        stored, layout = self._checkpoint.tensors, self._layout
        if part == COMPANIONS:
            yield from (PlannedTensor(key, stored[key].dtype, stored[key].shape) for key in self._companions)
            return
        if part == ZEROS:
            yield from layout.zeros
            return
        source = self._parts[part]
        for name, shape in source.kept.items():
            dtype = layout.kept or stored[self._checkpoint.key(name)].dtype
            yield PlannedTensor(layout.key(name), dtype, tuple(shape))
        for stack in self._stacks(source):
            for kind, (dtype, one) in self._kinds(source.packed[stack.linears[0]]).items():
                shape = tuple(one)
                if stack.experts is not None:
                    shape = (stack.experts, shape[0] * len(stack.linears) // stack.experts, *shape[1:])
                yield PlannedTensor(self._name(stack, kind), dtype, shape)

    def _kinds(self, linear: Linear) -> dict[str, tuple[torch.dtype, torch.Size]]:
        """The dtype and shape of each tensor of a linear: what `pack` makes of one without values."""
        if linear not in self._shapes:
            groups, columns = linear.inputs // self._group_size, linear.outputs // PACK
            with torch.device("meta"):
                packed = PackedWeight(
                    torch.empty(linear.inputs, columns, dtype=torch.int32),
                    torch.empty(groups, columns, dtype=torch.int32),
                    torch.empty(groups, linear.outputs, dtype=self._scale_dtype),
                )
                made = self._layout.pack(packed)
            self._shapes[linear] = {kind: (tensor.dtype, tensor.shape) for kind, tensor in made.items()}
        return self._shapes[linear]

    def _stacks(self, source: SourcePart) -> Sequence[Stack]:
        return self._layout.stacks(list(source.packed))

    def _name(self, stack: Stack, kind: str) -> str:
        return self._layout.key(stack.name.format(kind=kind))

    def _read_packed(self, source: SourcePart) -> dict[str, PackedWeight]:
        found = self._checkpoint.read_packed(source.packed) if source.packed else {}
        return {name: one._replace(scales=one.scales.to(self._scale_dtype)) for name, one in found.items()}

    def _kept(self, name: str) -> Iterable[Tensor]:
        """The rows of a tensor that is not packed, some at a time, in the dtype that they are stored in."""
        for piece in self._checkpoint.pieces(name):
            made = piece if self._layout.kept is None else piece.to(self._layout.kept)
            require_finite(name, made)
            yield made

    def _write_tensors(self, source: SourcePart) -> None:
        for name in source.kept:
            self._writer.write_pieces(self._layout.key(name), self._kept(name))
        packed = self._read_packed(source)
        for stack in self._stacks(source):
            kinds = list(self._kinds(source.packed[stack.linears[0]]))
            if len(kinds) == 1:  # weights that are not packed, which may be large: one at a time
                pieces = (self._layout.pack(packed[name])[kinds[0]] for name in stack.linears)
                self._writer.write_pieces(self._name(stack, kinds[0]), pieces)
                continue
            made = [self._layout.pack(packed[name]) for name in stack.linears]
            for kind in kinds:
                self._writer.write_pieces(self._name(stack, kind), (one[kind] for one in made))

    def _require_same(self, key: str, pieces: Iterable[Tensor]) -> None:
        """An error unless a tensor of the finished files has these rows, bit for bit."""
        found, row = read_tensors(self._stored, [key])[key], 0
        for piece in pieces:
            rows = found[row : row + len(piece)] if found.dim() else found
            row += len(piece) if found.dim() else 1
            if not torch.equal(_bytes(rows), _bytes(piece)):
                raise GemmaAwqError(f"{key} was read back with other values than were written.", _DAMAGED)

    def _compare(self, stack: Stack, source: SourcePart, packed: Mapping[str, PackedWeight]) -> float:
        """The largest difference of a stored weight, in units of its scale."""
        kinds = {kind: self._name(stack, kind) for kind in self._kinds(source.packed[stack.linears[0]])}
        stored = read_tensors(self._stored, kinds.values())
        worst = 0.0
        for place, name in enumerate(stack.linears):
            own = {kind: _part(stored[key], place, stack) for kind, key in kinds.items()}
            q, grid = unpack_weight(packed[name])
            exact, found = dequantize(q, grid), self._layout.weight(own)
            groups = (found - exact).abs_().unflatten(1, (grid.scale.shape[1], -1)).amax(-1)
            scale = grid.scale.abs()
            if not bool((groups <= self._layout.bound * scale).all()):
                raise GemmaAwqError(f"{name} was read back with other weights than the source's.", _DAMAGED)
            worst = max(worst, float(torch.where(scale > 0, groups / scale, 0.0).max()))
        return worst


_DAMAGED = "The disk or the source's files may be damaged. Export again; if it happens again, please report it."


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _part(tensor: Tensor, place: int, stack: Stack) -> Tensor:
    """The rows of one linear in a tensor that holds several."""
    if stack.experts is None:
        return tensor
    rows = tensor.flatten(0, 1)
    size = rows.shape[0] // len(stack.linears)
    return rows[place * size : (place + 1) * size]
