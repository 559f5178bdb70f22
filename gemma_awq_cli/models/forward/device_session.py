"""Sessions of our own decoder on a GPU: prompts are read in flat batches, and answers in steps that are replayed.

A step has its buffers and its recorded kernels for as long as its session lives; then the next session of as many rows
takes them over, so that nothing is recorded anew for each prompt.
"""

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from gemma_awq_cli.kernels import step_ops
from gemma_awq_cli.models.forward.cached_attention import CacheTensors
from gemma_awq_cli.models.forward.decode_step import DecodeStep
from gemma_awq_cli.models.forward.device_cache import DeviceCache
from gemma_awq_cli.models.forward.session import Logits
from gemma_awq_cli.models.forward.torch_decoder import DecoderSession
from gemma_awq_cli.models.forward.torch_layers import LayerOps, TextWeights, TorchLayers
from gemma_awq_cli.system.arrays import as_array

SMALL = 2048  # tokens up to which a capacity is rounded up to a power of two, and beyond it to a multiple of LARGE_STEP
LARGE_STEP = 1024


def fused_ops() -> LayerOps:
    """What a layer computes between its products, in one kernel each; see `step_ops.steps_problem`."""
    return LayerOps(
        step_ops.rms_norm, step_ops.add_normed, step_ops.add_and_norm, step_ops.gated, step_ops.place,
        step_ops.attend_once,
    )  # fmt: skip


class DeviceText:
    """A model's weights on a device, and the buffers of the last session that ended."""

    def __init__(self, weights: TextWeights, ops: LayerOps | None = None) -> None:
        self.layers = TorchLayers(weights, ops or LayerOps())
        self._free: DecodeStep | None = None

    @torch.inference_mode()
    def take(self, rows: int, capacity: int) -> DecodeStep:
        """Buffers for `rows` rows of at most `capacity` tokens, which hold nothing yet."""
        step, self._free = self._free, None
        if step is not None and step.rows == rows and step.cache.capacity >= capacity:
            step.cache.clear()
            return step
        del step  # before others are allocated
        return DecodeStep(self.layers, rows, rounded_up(capacity))

    def give_back(self, step: DecodeStep) -> None:
        """Keep a session's buffers for the next one."""
        self._free = step


def rounded_up(capacity: int) -> int:
    """A capacity that many sessions share."""
    if capacity <= SMALL:
        return 1 << max(0, capacity - 1).bit_length()
    return -(-capacity // LARGE_STEP) * LARGE_STEP


class DeviceSession(DecoderSession):
    """A `Session` over `DeviceText` of `rows` rows, each of at most `capacity` tokens."""

    reading_costs = (1.0,)  # several tokens of a row are not read in a step that is replayed: nothing is drafted

    _cache: DeviceCache

    def __init__(self, text: DeviceText, rows: int, capacity: int) -> None:
        self._text = text
        self._take(text.take(rows, capacity))
        super().__init__(text.layers.weights, rows, capacity, self._step.cache, text.layers.ops)

    def _take(self, step: DecodeStep) -> None:
        self._step = step
        self._finalizer = weakref.finalize(self, self._text.give_back, step)
        self._finalizer.atexit = False

    @property
    def step_failure(self) -> str | None:
        """Why steps could not be recorded and run kernel by kernel; None if nothing is wrong."""
        return self._step.recorder.failure

    def run_kernel_by_kernel(self, reason: str) -> None:
        """Replay nothing from here on. reason: what `step_failure` says then."""
        self._step.recorder.failure = reason

    def _share_cache(self) -> None:
        self._cached = CacheTensors(self._cache.keys, self._cache.values)

    @torch.inference_mode()
    def repeat_row(self, rows: int) -> None:
        """See `Session.repeat_row`."""
        first = self._cache
        self._finalizer.detach()
        self._take(self._text.take(rows, first.capacity))
        self._cache = self._step.cache
        self._cache.take_first_row(first)
        self._share_cache()

    @torch.inference_mode()
    def last_logits(self, tokens: Sequence[Sequence[int]], counts: Sequence[int]) -> Logits:
        """See `Session.last_logits`."""
        if not self._is_step(tokens, counts):
            return super().last_logits(tokens, counts)
        read = self._run_step(tokens)
        wanted = [row for row in range(read) if tokens[row] and counts[row]]
        logits = as_array(self._step.logits[:read].to("cpu", copy=True))  # the only time that the host waits
        return logits if len(wanted) == read else logits[wanted]

    @torch.inference_mode()
    def likeliest(self, tokens: Sequence[Sequence[int]]) -> list[int]:
        """See `CachedSession.likeliest`: the logits themselves do not leave the device."""
        read = self._run_step(tokens)
        found: list[int] = self._step.likeliest[:read].tolist()
        return [token for token, new in zip(found, tokens, strict=False) if new]

    @torch.inference_mode()
    def step_logits(self, tokens: Sequence[int]) -> Tensor:
        """Let every row read one token; the logits [R, V] float32 on the device, until the next step."""
        self._run_step([[token] for token in tokens])
        return self._step.logits

    def _run_step(self, tokens: Sequence[Sequence[int]]) -> int:
        """See `DecodeStep.run`."""
        self._cache.require_room(tokens, self._vocabulary)
        return self._step.run(tokens)

    def _is_step(self, tokens: Sequence[Sequence[int]], counts: Sequence[int]) -> bool:
        """Whether rows read one token each, and logits are wanted."""
        sized = len(tokens) == len(counts) == self._step.rows
        return sized and max(map(len, tokens)) == 1 and any(n for new, n in zip(tokens, counts, strict=True) if new)
