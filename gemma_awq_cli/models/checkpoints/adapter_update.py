"""What an adapter does to one weight: a rank update in float32, after a weight that replaces it, if there is one.

The sum is rounded once, to the dtype that the weight is stored in: so the merged model is a 16-bit checkpoint like any
other, which a quantized one can be compared with. Only some rows are held in float32 at a time.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_awq_cli.awq.precision import matmul_precision
from gemma_awq_cli.models.checkpoints.headers import TensorInfo
from gemma_awq_cli.models.checkpoints.weight_files import read_pieces, read_tensors, require_finite

ELEMENTS = 2**24  # of a weight that are merged at a time: 64 MiB in float32


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, by its name there."""

    name: str
    info: TensorInfo

    def read(self) -> Tensor:
        """The tensor as it is stored, memory-mapped."""
        return read_tensors({self.name: self.info}, [self.name])[self.name]

    def equals(self, other: "Stored") -> bool:
        """Whether both hold the same values, in whatever dtypes."""
        if self.info.shape != other.info.shape:
            return False
        ours, theirs = self.read(), other.read()
        return all(torch.equal(ours[rows].float(), theirs[rows].float()) for rows in _parts(ours))


@dataclass(frozen=True)
class Factors:
    """A low-rank product. inputs: A, [rank, inputs]; outputs: B, [outputs, rank]; scale: of the product.

    embedding: the weight is a table [tokens, channels], whose tokens are the inputs.
    """

    inputs: Stored
    outputs: Stored
    scale: float
    embedding: bool

    def sizes(self, shape: tuple[int, ...], rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """The shapes that A and B must have for a weight of `shape`."""
        outputs, inputs = (shape[-1], shape[0]) if self.embedding else (shape[0], shape[-1])
        return (rank, inputs), (outputs, rank)

    def read(self) -> tuple[Tensor, Tensor]:
        """Two float32 matrices [rows, rank] and [rank, columns], whose product is added to the weight."""
        a, b = self.inputs.read().float(), self.outputs.read().float()
        left, right = (a.t(), b.t()) if self.embedding else (b, a)
        return left * self.scale, right


@dataclass(frozen=True)
class Update:
    """What is done to a weight. whole: replaces it; factors: whose product is added to it. None: nothing of the kind.

    The values of both were checked to be finite.
    """

    whole: Stored | None
    factors: Factors | None

    @property
    def changes(self) -> bool:
        return self.whole is not None or self.factors is not None

    def is_tied_to(self, embedding: "Update") -> bool:
        """Whether this update of a head makes the weight that an embedding's makes of the same."""
        if (self.whole is None) != (embedding.whole is None) or (self.factors is None) != (embedding.factors is None):
            return False
        if self.whole is not None and embedding.whole is not None and not self.whole.equals(embedding.whole):
            return False
        if self.factors is None or embedding.factors is None:
            return True
        return all(map(torch.equal, self.factors.read(), embedding.factors.read()))

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """The weight with the update, in its own dtype. name: for errors."""
        merged = torch.empty_like(weight)
        merge = self._merger(name)
        for rows in _parts(weight):
            merged[rows] = merge(weight[rows], rows)
        return merged

    def merged_pieces(self, name: str, info: TensorInfo) -> Iterator[Tensor]:
        """The rows of a weight with the update, in order, some at a time."""
        merge, first = self._merger(name), 0
        for piece in read_pieces(name, info):
            rows = slice(first, first + len(piece))
            first = rows.stop
            yield merge(piece, rows)

    def _merger(self, name: str) -> Callable[[Tensor, slice], Tensor]:
        """What makes some rows of the merged weight from the same rows of the weight, and where they are."""
        whole = None if self.whole is None else self.whole.read()
        factors = None if self.factors is None else self.factors.read()

        def merge(piece: Tensor, rows: slice) -> Tensor:
            merged = (piece if whole is None else whole[rows]).to(torch.float32, copy=True)
            if factors is not None:
                with matmul_precision("highest"):
                    merged.addmm_(factors[0][rows], factors[1])
            merged = merged.to(piece.dtype)
            require_finite(name, merged)
            return merged

        return merge


def _parts(weight: Tensor) -> Iterator[slice]:
    """Some rows at a time, in order."""
    rows = len(weight)
    step = max(1, ELEMENTS * rows // max(1, weight.numel()))
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))
