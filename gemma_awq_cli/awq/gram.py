"""The Gram matrix of a linear's input: all that the searches and the rounding need to know of the calibration rows.

`H = X^T X` turns the squared output error of any candidate, `||X E^T||^2`, into `tr(E H E^T)` without a forward pass.
For very wide inputs H is kept in square blocks on the diagonal, [B, k, k] with B k = K: what couples two blocks is
left out of the sums, for every candidate and for round-to-nearest alike.
"""

import torch
from torch import Tensor

TILE = 256  # a Gram matrix is symmetric: only its upper tiles of this width are summed


class InputStatistics:
    """Running sums over the rows that enter a set of linears.

    gram: [B, k, k] float32, mean over the rows of their weight times x^T x, whole after `finish`; mean_abs: [K]
    float32, mean |x|; drift: [B, k, k] float32, mean of weight times (r - x)^T x, r being what the row would have been
    without the quantization of the layers before, or None where nothing tells it.
    """

    def __init__(self, width: int, block: int, device: torch.device, drifting: bool = False) -> None:
        self.blocks = width // block
        self.gram = torch.zeros((self.blocks, block, block), dtype=torch.float32, device=device)
        self.drift = torch.zeros_like(self.gram) if drifting else None
        self.abs_sum = torch.zeros(width, dtype=torch.float32, device=device)
        self.rows = 0

    def add(self, x: Tensor, weights: Tensor | None = None, undisturbed: Tensor | None = None) -> None:
        """Add rows x: [..., K]; weights [...]: how much each counts in the matrices, 1 by default; undisturbed
        [..., K]: the same rows without the quantization of the layers before.
        """
        x = x.reshape(-1, self.abs_sum.shape[0]).to(torch.float32)
        self.rows += x.shape[0]
        self.abs_sum += x.abs().sum(0)
        root = None if weights is None else weights.reshape(-1, 1).sqrt()
        if self.drift is not None and undisturbed is not None:
            lost = undisturbed.reshape(x.shape) - x
            for total, own, part in zip(self.drift, lost.chunk(self.blocks, 1), x.chunk(self.blocks, 1), strict=True):
                total.addmm_(own.t(), part if root is None else part * root.square())
            del lost
        if root is not None:
            x = x * root
        for part, total in zip(x.chunk(self.blocks, dim=1), self.gram, strict=True):
            for first in range(0, total.shape[0], TILE):
                tile = slice(first, first + TILE)
                total[tile, first:].addmm_(part[:, tile].t(), part[:, first:])

    def finish(self) -> None:
        """Turn the sums into means. Call once, after the last row."""
        for total in self.gram:
            for first in range(0, total.shape[0], TILE):
                end = first + TILE
                total[end:, first:end] = total[first:end, end:].t()
        self.gram /= self.rows
        if self.drift is not None:
            self.drift /= self.rows
        self.mean_abs = self.abs_sum / self.rows


def block_width(width: int, group_size: int, limit: int) -> int:
    """The widest block <= limit that divides `width` into whole groups."""
    if width <= limit:
        return width
    groups = width // group_size
    for count in range(2, groups + 1):
        if groups % count == 0 and width // count <= limit:
            return width // count
    return group_size


def scaled_gram(gram: Tensor, scale: Tensor) -> Tensor:
    """The Gram of X / scale: gram [B, k, k], scale [K] -> [B, k, k]."""
    inverse = scale.reciprocal().view(gram.shape[0], -1)
    return (gram * inverse[:, :, None]).mul_(inverse[:, None, :])


def output_error(error: Tensor, gram: Tensor) -> float:
    """`tr(E H E^T)`: the mean squared output error over the rows, summed over outputs. error: [N, K] float32."""
    total = 0.0
    for part, block in zip(error.chunk(gram.shape[0], dim=1), gram, strict=True):
        total += float(torch.linalg.vecdot((part @ block).flatten(), part.flatten()))
    return total
