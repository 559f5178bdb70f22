"""The Gram matrix of a linear's input: everything that the searches and the rounding need from the calibration tokens.

`H = X^T X` turns the squared output error of any candidate, `||X E^T||^2`, into `tr(E H E^T)` without a forward pass.
For very wide inputs only square blocks on the diagonal of H are kept, [B, k, k] with B k = K. The products of channels
in different blocks are then missing from the sums, for every candidate and for round-to-nearest alike.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Self

import torch
from torch import Tensor

from gemma_awq_cli.awq.row_shares import RowShares

TILE = 256  # a Gram matrix is symmetric: only its upper tiles, each this wide, are summed


def add_gram(total: Tensor, magnitudes: Tensor, x: Tensor, roots: Tensor | None) -> None:
    """Add the products of tokens x [T, k], each multiplied by its root [T], and the tokens' magnitudes.

    total: [k, k] float32, of which the tiles on and above the diagonal are summed; magnitudes: [k] float32; roots: None
    for 1.
    """
    x = x.to(torch.float32)
    magnitudes += x.abs().sum(0)
    add_products(total, x if roots is None else x * roots[:, None])


def add_cross(total: Tensor, left: Tensor, right: Tensor, factors: Tensor | None) -> None:
    """Add `left^T (factors * right)` to `total` [k, k] float32.

    left, right: [T, k] float32; factors: [T], None for 1.
    """
    total.addmm_(left.t(), right if factors is None else right * factors[:, None])


class Sums(NamedTuple):
    """How sums over tokens are computed: gram as by `add_gram`, cross as by `add_cross`."""

    gram: Callable[[Tensor, Tensor, Tensor, Tensor | None], None]
    cross: Callable[[Tensor, Tensor, Tensor, Tensor | None], None]


IN_TORCH = Sums(add_gram, add_cross)


class InputStatistics:
    """Sums over the tokens that enter a set of linears. x [K] is a token's input on the path that is quantized.

    After `finish`: gram: [B, k, k] float32, the mean over the tokens of weight times x^T x; mean_abs: [K] float32, the
    mean of |x|; error_gram: [B, k, k] float32, the mean of weight times (r - x)^T x, r being the same token's input on
    the reference path. It is None unless `with_reference`.
    """

    def __init__(
        self,
        width: int,
        block: int,
        device: torch.device,
        with_reference: bool = False,
        sums: Sums = IN_TORCH,
    ) -> None:
        self.blocks = width // block
        self._sums = sums
        self.gram = torch.zeros((self.blocks, block, block), dtype=torch.float32, device=device)
        self.error_gram = torch.zeros_like(self.gram) if with_reference else None
        self.abs_sum = torch.zeros(width, dtype=torch.float32, device=device)
        self.tokens = 0

    def add(self, x: Tensor, weights: Tensor | None = None, reference: Tensor | None = None) -> None:
        """Add the tokens x [..., K].

        weights [...]: how much each token counts in the matrices, 1 by default; reference [..., K]: the same tokens on
        the reference path.
        """
        x = x.reshape(-1, self.abs_sum.shape[0])
        self.tokens += x.shape[0]
        if weights is not None:
            weights = weights.reshape(-1)
        if self.error_gram is not None and reference is not None:
            self._add_errors(x.to(torch.float32), weights, reference)
        roots = None if weights is None else weights.sqrt()
        magnitudes = self.abs_sum.chunk(self.blocks)
        for part, total, own in zip(x.chunk(self.blocks, dim=1), self.gram, magnitudes, strict=True):
            self._sums.gram(total, own, part, roots)

    def _add_errors(self, x: Tensor, weights: Tensor | None, reference: Tensor) -> None:
        assert self.error_gram is not None
        error = (reference.reshape(x.shape) - x).chunk(self.blocks, 1)
        for total, lost, part in zip(self.error_gram, error, x.chunk(self.blocks, 1), strict=True):
            self._sums.cross(total, lost, part, weights)

    def add_up(self, shares: RowShares) -> None:
        """Add the sums over the tokens of other processes. Call it before `finish`."""
        for total in self.gram:
            for tile in upper_tiles(total):
                shares.add_up(tile)
        for total in self.error_gram if self.error_gram is not None else ():
            for part in total.split(TILE):
                shares.add_up(part)
        shares.add_up(self.abs_sum)
        self.tokens = int(shares.total(self.tokens))

    def finish(self, tokens: int | None = None) -> None:
        """Turn the sums into means. Call it once, after the last token.

        tokens: what the Gram matrices are divided by, by default the number of tokens that were added.
        """
        over = self.tokens if tokens is None else tokens
        for total in self.gram:
            mirror(total)
        self.gram /= over
        if self.error_gram is not None:
            self.error_gram /= over
        self.mean_abs = self.abs_sum / self.tokens

    def parts(self) -> Iterator[Tensor]:
        """Yield views of all that `finish` found, without a reference path, each number once."""
        yield self.mean_abs
        for total in self.gram:
            yield from upper_tiles(total)

    @classmethod
    def of_parts(cls, width: int, block: int, device: torch.device, fill: Callable[[Tensor], None]) -> Self:
        """Return finished statistics again. fill: writes into each of the `parts` what it was, in the same order."""
        found = cls(width, block, device)
        found.mean_abs = found.abs_sum
        for part in found.parts():
            fill(part)
        for total in found.gram:
            mirror(total)
        return found

    def take_error_gram(self) -> Tensor | None:
        """Hand `error_gram` over and forget it: it is as large as a weight, and needed once."""
        taken, self.error_gram = self.error_gram, None
        return taken


def upper_tiles(total: Tensor) -> Iterator[Tensor]:
    """Yield views of the tiles on and above the diagonal of a matrix [k, k], a row of tiles at a time."""
    for first in range(0, total.shape[0], TILE):
        yield total[first : first + TILE, first:]


def kept_bytes(width: int, block: int) -> int:
    """Return the bytes of the `parts` of finished statistics of `width` channels in blocks of `block`."""
    tiles = sum(min(TILE, block - first) * (block - first) for first in range(0, block, TILE))
    return (width + width // block * tiles) * torch.float32.itemsize


def add_products(total: Tensor, x: Tensor) -> None:
    """Add `x^T x` to the upper tiles of `total` [k, k] float32. x: [T, k]."""
    for first in range(0, total.shape[0], TILE):
        tile = slice(first, first + TILE)
        if x.dtype == total.dtype:
            total[tile, first:].addmm_(x[:, tile].t(), x[:, first:])
        else:
            total[tile, first:] += x[:, tile].t() @ x[:, first:]


def mirror(total: Tensor) -> None:
    """Copy the upper tiles of a symmetric matrix [k, k] to the lower ones, in place."""
    for first in range(0, total.shape[0], TILE):
        end = first + TILE
        total[first:end, first:end] = (corner := total[first:end, first:end].triu()) + corner.triu(1).t()
        total[end:, first:end] = total[first:end, end:].t()


def block_width(width: int, group_size: int, limit: int) -> int:
    """Return the widest block of at most `limit` channels that divides `width` into blocks of whole groups."""
    if width <= limit:
        return width
    groups = width // group_size
    for count in range(2, groups + 1):
        if groups % count == 0 and width // count <= limit:
            return width // count
    return group_size


def scaled_gram(gram: Tensor, scale: Tensor) -> Tensor:
    """Return the Gram matrix of X / scale: gram [B, k, k], scale [K] -> [B, k, k]."""
    inverse = scale.reciprocal().view(gram.shape[0], -1)
    return (gram * inverse[:, :, None]).mul_(inverse[:, None, :])


def output_error(error: Tensor, gram: Tensor) -> float:
    """Return `tr(E H E^T)`, the mean squared output error over the tokens, summed over the outputs.

    error: [N, K] float32, of the weight; gram: [B, k, k].
    """
    total = 0.0
    for part, block in zip(error.chunk(gram.shape[0], dim=1), gram, strict=True):
        total += float(torch.linalg.vecdot((part @ block).flatten(), part.flatten()))
    return total
