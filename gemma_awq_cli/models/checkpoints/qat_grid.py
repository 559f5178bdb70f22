"""Whether a 16-bit checkpoint's weights lie on a 4-bit grid, as quantization-aware training leaves them."""

from typing import NamedTuple

import torch

from gemma_awq_cli.awq.known_grid import KNOWN_GROUP, find_grid
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.weight_files import read_tensors

SAMPLED_ROWS = 8  # of a linear, evenly spaced: groups are found or not found without the others


class GridSample(NamedTuple):
    """Groups that were looked at, those of zeros left out, and how many of them are on a 4-bit grid."""

    groups: int
    on_grid: int

    @property
    def share(self) -> float:
        return self.on_grid / self.groups if self.groups else 0.0


def sample_grids(checkpoint: Checkpoint, dtype: torch.dtype) -> GridSample:
    """Look for 4-bit grids in some rows of every linear, as they are in the 16-bit `dtype` of the artifact."""
    groups = on_grid = 0
    layouts = enumerate(checkpoint.shape.layouts)
    names = [checkpoint.key(f"model.layers.{index}.{name}") for index, layout in layouts for name in layout.unpacked()]
    for weight in read_tensors(checkpoint.tensors, names).values():
        if weight.shape[-1] % KNOWN_GROUP == 0:
            rows = weight.flatten(0, -2)
            rows = rows[:: -(-rows.shape[0] // SAMPLED_ROWS)].to(dtype)
            used = (rows != 0).unflatten(1, (-1, KNOWN_GROUP)).any(-1)
            groups += int(used.sum())
            on_grid += int((find_grid(rows).placed & used).sum())
    return GridSample(groups, on_grid)
