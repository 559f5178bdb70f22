"""One decode step of several rows over buffers that stay where they are: from token ids to logits, without the host.

Shapes depend on how many rows there are and on a bound of their lengths, and on nothing else: what changes from step to
step is in device tensors. So the kernels of a step can be recorded and replayed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gemma_awq_cli.kernels.plain_ops import attend_seen, seen_slots
from gemma_awq_cli.models.forward.device_cache import DeviceCache, make_device_cache
from gemma_awq_cli.models.forward.memory import copies_from_pinned
from gemma_awq_cli.models.forward.step_graph import Recorder
from gemma_awq_cli.models.forward.torch_layers import LayerOps, Rotary, TextWeights, TorchLayers, head_facts

LEAST_BOUND = 256  # of the lengths: each doubling is a graph of its own
_IDS, _POSITIONS, _READS = range(3)  # the rows of the inputs


@dataclass(frozen=True)
class StepTokens:
    """The tokens of a step, one of each of the first T rows of a cache: see `Tokens`.

    positions: [T]; reads: [T] bool, which rows read anything; bound: of the rows' lengths after the step; visible,
    at, angles: what layers share, by window and slots, by slots, and by rope.
    """

    weights: TextWeights
    ops: LayerOps
    rotary: Rotary
    cache: DeviceCache
    positions: Tensor
    reads: Tensor
    bound: int
    embedded: Tensor
    per_layer: Tensor | None
    visible: dict[tuple[int | None, int], Tensor] = field(default_factory=dict)
    at: dict[int, Tensor] = field(default_factory=dict)
    angles: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def attended(self, index: int, qkv: Tensor) -> Tensor:
        """See `Tokens.attended`."""
        arch, layout = self.weights.arch, self.weights.arch.layouts[index]
        cos, sin = self.rotary.angles(index, self.positions, qkv.dtype, self.angles)
        slots = self.cache.keys[index].shape[2]
        q = self.ops.place(
            qkv, cos=cos, sin=sin, keys=self.cache.all_keys[index], values=self.cache.all_values[index],
            at=self._at(slots), **head_facts(self.weights, index),
        )  # fmt: skip
        held = slice(0, min(self.bound, slots))
        keys, values = (part[index][: len(q), :, held] for part in (self.cache.keys, self.cache.values))
        if self.ops.attend_once is not None:
            return self.ops.attend_once(
                q, keys, values, self.positions, slots, layout.window or 0, arch.query_scale,
                arch.attention_softcap or 0.0,
            )  # fmt: skip
        visible = self._visible(layout.window, slots)[:, None, None, : keys.shape[2]]
        return attend_seen(q, keys, values, visible, arch.query_scale, arch.attention_softcap)

    def _at(self, slots: int) -> Tensor:
        """Where in a layer of so many slots each token goes: [T]."""
        if slots not in self.at:
            self.at[slots] = torch.where(self.reads, self.positions % slots, slots)  # the last slot is nobody's
        return self.at[slots]

    def _visible(self, window: int | None, slots: int) -> Tensor:
        """Which slots of a layer each token sees: [T, slots] bool."""
        if (window, slots) not in self.visible:
            self.visible[window, slots] = seen_slots(self.positions, slots, window)
        return self.visible[window, slots]


class DecodeStep:
    """The buffers of `rows` rows of at most `capacity` tokens, and the step over them.

    logits: [R, V] float32; likeliest: [R] int64, each row's most likely token, or -1 where a logit is not finite.
    """

    def __init__(self, layers: TorchLayers, rows: int, capacity: int) -> None:
        weights, arch = layers.weights, layers.weights.arch
        device = weights.device
        self.layers = layers
        self.rows = rows
        self.cache = make_device_cache(arch.layouts, rows, capacity, weights.dtype, device)
        self.rotary = Rotary(arch, device)
        self.recorder = Recorder(device)
        self._host_inputs = torch.zeros(3, rows, dtype=torch.int64, pin_memory=copies_from_pinned(device))
        self._inputs = torch.zeros(3, rows, dtype=torch.int64, device=device)
        self._per_layer: Tensor | None = None
        if weights.per_layer is not None:
            width = weights.per_layer.table.shape[1]
            self._per_layer = torch.zeros(rows, width, dtype=weights.dtype, device=device)
        self.logits = torch.zeros(rows, arch.vocabulary, dtype=torch.float32, device=device)
        self.likeliest = torch.zeros(rows, dtype=torch.int64, device=device)

    def run(self, tokens: Sequence[Sequence[int]]) -> int:
        """Let each row read its token or none. How many rows, from the first on, have logits: those that read do."""
        lengths = self.cache.lengths
        count = _at_least_pow2(1 + max(row for row, new in enumerate(tokens) if new), self.rows)
        bound = _at_least_pow2(max(LEAST_BOUND, 1 + max(lengths)), self.cache.capacity)
        columns = [(new[0], length, 1) if new else (0, 0, 0) for new, length in zip(tokens, lengths, strict=True)]
        inputs = self._host_inputs  # the device has read the last ones: somebody waited for what it made of them
        inputs.copy_(torch.tensor(columns).t())
        self._inputs.copy_(inputs, non_blocking=True)
        if self._per_layer is not None:
            embedding = self.layers.weights.per_layer
            assert embedding is not None
            self._per_layer.copy_(embedding.rows(inputs[_IDS]))
        self.recorder.run((count, bound), lambda: self._step(count, bound))
        for row, new in enumerate(tokens):
            lengths[row] += len(new)
        return count

    def _step(self, count: int, bound: int) -> None:
        weights, inputs = self.layers.weights, self._inputs[:, :count]
        embedded = self.layers.embedded(inputs[_IDS])
        tokens = StepTokens(
            weights=weights,
            ops=self.layers.ops,
            rotary=self.rotary,
            cache=self.cache,
            positions=inputs[_POSITIONS],
            reads=inputs[_READS] > 0,
            bound=bound,
            embedded=embedded,
            per_layer=None if self._per_layer is None else self._per_layer[:count],
        )
        x = self.layers.start(embedded)
        for index in range(weights.arch.layers):
            x = self.layers.output(index, x, tokens)
        logits = self.layers.logits(self.layers.end(x))
        least, most = logits.aminmax(dim=-1)
        self.logits[:count] = logits
        self.likeliest[:count] = torch.where(least.isfinite() & most.isfinite(), logits.argmax(-1), -1)


def _at_least_pow2(least: int, most: int) -> int:
    """The smallest power of two from `least` on, or `most` if that is smaller."""
    return min(1 << (least - 1).bit_length(), most)
