"""The statistics of the inputs of a layer's linears while the calibration rows run through it.

Tokens are weighted by the effect that an error at them has. Two things make tokens unequal, and both were measured (see
docs/method.md):

- All other tokens attend to a row's BOS: it is one token of hundreds, but an error there reaches all of them.
- Gemma 2 and 3 normalize the outputs of attention and MLP before they are added to the residual. The norm divides an
  error of `o` or `down` by the size of that token's output, so the squared error counts relative to the mean square of
  the output.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gemma_awq_cli.awq.gram import IN_TORCH, InputStatistics, Sums, block_width
from gemma_awq_cli.awq.row_shares import ALONE, RowShares
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.gemma.family import ScaleGroup
from gemma_awq_cli.models.gemma.layers import LayerLayout

BOS_WEIGHT = 64.0  # relative to the mean of the row's other tokens


class Observer:
    """Collects the statistics of each group's input while a layer runs on rows that each begin with BOS.

    paired: each batch is two halves, rows on the reference path and then the same rows on the quantized path. The
    statistics are those of the quantized path, with the differences from the reference path.
    """

    def __init__(
        self,
        layout: LayerLayout,
        module: nn.Module,
        group_size: int,
        gram_limit: int,
        device: torch.device,
        paired: bool = False,
        sums: Sums = IN_TORCH,
    ) -> None:
        self._groups = layout.groups
        self._statistics: dict[str, InputStatistics] = {}
        self._hooks = []
        for group in layout.groups:
            width = layout.linears[group.linears[0]].inputs
            statistics = InputStatistics(width, block_width(width, group_size, gram_limit), device, paired, sums)
            self._statistics[group.name] = statistics
            hook = _adder(statistics, group.normalized, paired)
            self._hooks.append(module.get_submodule(group.linears[0]).register_forward_hook(hook))

    def finish(self, index: int, shares: RowShares = ALONE) -> None:
        """Stop observing layer `index`, counted from 0. Raises if the rows' activations overflowed.

        shares: of the rows, whose statistics become those of all processes.
        """
        for hook in self._hooks:
            hook.remove()
        for name, statistics in self._statistics.items():
            statistics.add_up(shares)
            statistics.finish()
            if not torch.isfinite(statistics.gram.diagonal(dim1=1, dim2=2)).all():
                raise GemmaAwqError(
                    f"Layer {index + 1}: the input of {name} contains NaN or infinite values, although the weights are "
                    "finite.",
                    "The checkpoint is damaged or its training diverged. Compare its files with the original ones.",
                )

    @property
    def statistics(self) -> Mapping[str, InputStatistics]:
        """By the names of the groups."""
        return self._statistics

    def hand_over(self) -> Iterator[tuple[ScaleGroup, InputStatistics]]:
        """Yield each group and its statistics, from the last group to the first, and forget them.

        A Gram matrix is as large as a weight: each one is freed when its receiver is done with it.
        """
        return ((group, self._statistics.pop(group.name)) for group in reversed(self._groups))


def _adder(statistics: InputStatistics, normalized: bool, paired: bool) -> Any:
    """Return a forward hook of a linear that adds its input to `statistics`."""

    def add(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        x, reference = arguments[0], None
        if paired:
            reference, x = x.chunk(2)
            output = output.chunk(2)[0]
        statistics.add(x, token_weights(output, normalized), reference)

    return add


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16 products with float32 sums."""
    if device.type == "cuda":
        # of this device: torch.cuda.is_bf16_supported tells of the first one
        return torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= 8
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def bfloat16_products(device: torch.device) -> AbstractContextManager[object]:
    """Run linears and attention in bfloat16 if the device multiplies it, and in float32 if not.

    This is for rows that are only observed: rounding their inputs adds noise of 0.4 %, independent for each token.
    """
    return torch.autocast(device.type, torch.bfloat16) if multiplies_bfloat16(device) else nullcontext()


@contextmanager
def rounded_once(module: nn.Module) -> Iterator[None]:
    """Round the weights of linears, and what several of them are given, once inside of `bfloat16_products`.

    It would round the weights for every batch, and the same input for each linear. Only on the CPU: on a GPU that has
    not been tried. module: a copy that is nobody else's, as `TextStack.layer` makes it.
    """
    linears = [part for part in module.modules() if isinstance(part, nn.Linear) and part.weight.device.type == "cpu"]
    linears = linears if torch.is_autocast_enabled("cpu") else []
    wide, last = [part.weight for part in linears], _LastRounded()
    for part in linears:
        part.weight = nn.Parameter(part.weight.to(torch.bfloat16), requires_grad=False)
        part.forward = partial(_forward, part.forward, last)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for part, weight in zip(linears, wide, strict=True):
            part.weight = weight
            del part.forward


class _LastRounded:
    """Rounds tensors to bfloat16, and remembers the last one."""

    def __init__(self) -> None:
        self._given = self._rounded = torch.empty(0)

    def __call__(self, x: Tensor) -> Tensor:
        if x is not self._given:
            self._given, self._rounded = x, x.to(torch.bfloat16)
        return self._rounded


def _forward(own: Callable[[Tensor], Tensor], rounded: _LastRounded, x: Tensor) -> Tensor:
    return own(rounded(x))


def token_weights(output: Tensor, normalized: bool) -> Tensor:
    """Return how much an error at each token counts: [R, S]. The mean over a row's tokens after the BOS is 1.

    output: [R, S, N] of the linear; normalized: whether a norm follows it.
    """
    weights = torch.ones(output.shape[:2], device=output.device)
    if normalized:
        tiny = torch.finfo(torch.float32).tiny
        # in one pass over the output
        squares = torch.linalg.vector_norm(output, dim=-1, dtype=torch.float32).square_().div_(output.shape[-1])
        weights = squares.clamp_(min=tiny).reciprocal_()
        weights /= weights[:, 1:].mean(1, keepdim=True)
    weights[:, 0] = BOS_WEIGHT
    return weights
