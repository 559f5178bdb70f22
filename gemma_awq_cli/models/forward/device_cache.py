"""The keys and values of rows in a device's memory, at addresses that never change: see `kv_cache`.

Each layer has one slot more than its ring, which no token sees: where rows write that have nothing to read in a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemma_awq_cli.models.forward.kv_cache import SPARE, KVCache
from gemma_awq_cli.models.gemma.layers import LayerLayout
from gemma_awq_cli.system.arrays import DTYPES, Array, as_array, as_tensor


@dataclass(frozen=True)
class DeviceCache(KVCache):
    """keys, values: the rings; all_keys, all_values: the same memory with the slot behind each ring."""

    all_keys: tuple[Tensor, ...]
    all_values: tuple[Tensor, ...]

    def clear(self) -> None:
        """Forget all rows, and what they held."""
        for layer in {id(layer): layer for layer in (*self.all_keys, *self.all_values)}.values():
            layer.zero_()
        for row in range(len(self.lengths)):
            self.reset(row)

    def take_first_row(self, other: "DeviceCache") -> None:
        """Let every row be the first one of another cache, which has no more room."""
        for own, its in zip((*self.keys, *self.values), (*other.keys, *other.values), strict=True):
            own[:, :, : its.shape[2]] = its[:1]  # a ring of fewer slots has never wrapped around
        self.lengths[:] = [other.lengths[0]] * len(self.lengths)
        self.reached[:] = [other.reached[0]] * len(self.reached)

    def _kept(self, part: Any) -> Tensor:
        kept: Tensor = part.clone()
        return kept

    def _saved(self, part: Any) -> Array:
        return as_array(part.to("cpu", copy=True).contiguous())

    @torch.inference_mode()
    def _restore(self, part: Any, copy: Any) -> None:
        part.copy_(copy if isinstance(copy, Tensor) else as_tensor(copy))

    def _dtype(self, layer: Any) -> np.dtype[Any]:
        return DTYPES[str(layer.dtype).removeprefix("torch.")]


def make_device_cache(
    layouts: Sequence[LayerLayout], rows: int, capacity: int, dtype: torch.dtype, device: torch.device
) -> DeviceCache:
    """An empty cache of `rows` rows, each of at most `capacity` tokens."""

    def layers() -> tuple[Tensor, ...]:
        made: list[Tensor] = []
        for layout in layouts:
            if layout.kv_source is not None:
                made.append(made[layout.kv_source])
                continue
            slots = min(layout.window + SPARE, capacity) if layout.window else capacity
            made.append(torch.zeros(rows, layout.kv_heads, slots + 1, layout.head_dim, dtype=dtype, device=device))
        return tuple(made)

    def rings(every: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        views = {id(layer): layer[:, :, :-1] for layer in every}
        return tuple(views[id(layer)] for layer in every)

    keys, values = layers(), layers()
    return DeviceCache(rings(keys), rings(values), [0] * rows, [0] * rows, capacity, keys, values)
