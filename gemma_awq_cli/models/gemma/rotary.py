"""The rotary embedding of each layer: its frequencies, computed from the config's parameters."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.gemma.config_values import HINT
from gemma_awq_cli.models.gemma.family import Family
from gemma_awq_cli.models.gemma.layers import LayerLayout
from gemma_awq_cli.system.failures import library_errors


@dataclass(frozen=True)
class Rope:
    """inv_freq: [head_dim / 2] float32; factor: what cosine and sine are multiplied by."""

    inv_freq: npt.NDArray[np.float32]
    factor: float


def ropes_of(config: Any, family: Family, layouts: Sequence[LayerLayout]) -> tuple[Rope, ...]:
    """The rotary embedding of each layer; layers of one kind share one object. config: a `Checkpoint`'s facts."""
    by_kind = {layout.kind: layout for layout in layouts}
    made = {kind: _rope(config, family, layout) for kind, layout in by_kind.items()}
    return tuple(made[layout.kind] for layout in layouts)


def require_rope(config: Any, family: Family, layouts: Sequence[LayerLayout], where: Path) -> None:
    """An error unless every layer's rotary frequencies are numbers and fit the heads.

    where: config.json, for errors.
    """
    for _, layout in sorted({layout.kind: layout for layout in layouts}.items()):
        own, pairs = layout.rope, layout.head_dim // 2
        if own.get("partial_rotary_factor", 1.0) != 1.0 and own["rope_type"] != "proportional":
            raise GemmaAwqError(
                f"{where}: partial_rotary_factor is {own['partial_rotary_factor']:g}, but a Gemma rotates whole heads.",
                HINT,
            )
        for name in ("short_factor", "long_factor"):  # transformers takes one or the other by the text's length
            if name in own and len(own[name]) != pairs:
                raise GemmaAwqError(
                    f"{where}: {name} has {len(own[name])} entries; head_dim {layout.head_dim} needs {pairs}, one per "
                    "pair of channels.",
                    HINT,
                )
        with library_errors(f"{where}: rotary parameters of type {own['rope_type']} cannot be used", HINT):
            rope = _rope(config, family, layout)
        numbers = [*rope.inv_freq.tolist(), rope.factor]
        if len(rope.inv_freq) != pairs or not all(0 <= number < float("inf") for number in numbers):
            raise GemmaAwqError(
                f"{where}: the rotary parameters do not give a frequency for each pair of the {layout.head_dim} "
                "channels of a head.",
                HINT,
            )


def _rope(config: Any, family: Family, layout: LayerLayout) -> Rope:
    own, pairs = layout.rope, layout.head_dim // 2
    kind = own.get("rope_type", "default")
    if kind in ("default", "linear"):
        return Rope(
            _powers(own["rope_theta"], pairs, layout.head_dim) / np.float32(own["factor"] if kind == "linear" else 1),
            1.0,
        )
    if kind == "proportional" and "factor" not in own:  # the first pairs rotate, the others stand still
        rotated = int(own.get("partial_rotary_factor", 1.0) * layout.head_dim // 2)
        still = np.zeros(pairs - rotated, np.float32)
        return Rope(np.concatenate([_powers(own["rope_theta"], rotated, layout.head_dim), still]), 1.0)
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    chosen = {"layer_type": layout.kind} if family.rope_per_kind else {}
    inv_freq, factor = ROPE_INIT_FUNCTIONS[kind](config, None, **chosen)
    return Rope(inv_freq.numpy(), float(factor))


def _powers(theta: float, count: int, head_dim: int) -> npt.NDArray[np.float32]:
    """theta ** -(2 i / head_dim) for the first `count` pairs, rounded where torch rounds it for transformers."""
    steps = np.arange(0, 2 * count, 2, dtype=np.float32) / np.float32(head_dim)
    return np.float32(1) / (float(theta) ** steps.astype(np.float64)).astype(np.float32)
