"""What a layer's linears see while the calibration rows run through it, each token counted by what its error would do.

Two things make tokens unequal, and both were measured (see `BOS_WEIGHT`, and the README's table of choices):

- Every row's BOS is what attention rests on: one token of hundreds, but an error there reaches all of them.
- Gemma 2 and 3 normalize what attention and MLP give before it is added. An error of `o` or `down` is divided by that
  token's output, so the squared error that counts is relative to the output's mean square.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from gemma_awq_cli.awq.gram import InputStatistics, block_width
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.gemma.families import Family

BOS_WEIGHT = 64.0  # relative to the mean of the row's other tokens


class Observer:
    """Collects the statistics of each group's input while a layer runs on rows that each begin with BOS.

    paired: the layer runs on two sets of rows at once, the 16-bit model's first and then the same as the quantized
    layers before have changed them. The statistics are those of the second, and how they drifted from the first.
    """

    def __init__(
        self,
        family: Family,
        module: nn.Module,
        group_size: int,
        gram_limit: int,
        device: torch.device,
        paired: bool = False,
    ) -> None:
        self.statistics: dict[str, InputStatistics] = {}
        self._hooks = []
        for group in family.groups:
            linear = module.get_submodule(group.linears[0])
            width = int(linear.in_features)  # type: ignore[arg-type]
            statistics = InputStatistics(width, block_width(width, group_size, gram_limit), device, paired)
            self.statistics[group.name] = statistics
            self._hooks.append(linear.register_forward_hook(self._adder(statistics, group.normalized, paired)))

    @staticmethod
    def _adder(statistics: InputStatistics, normalized: bool, paired: bool) -> Any:
        def add(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            x, undisturbed = arguments[0], None
            if paired:
                undisturbed, x = x.chunk(2)
                output = output.chunk(2)[0]
            statistics.add(x, token_weights(output, normalized), undisturbed)

        return add

    def finish(self, index: int) -> dict[str, InputStatistics]:
        """Stop observing layer `index`; the means are ready. An error if the rows' activations overflowed."""
        for hook in self._hooks:
            hook.remove()
        for name, statistics in self.statistics.items():
            statistics.finish()
            if not torch.isfinite(statistics.gram.diagonal(dim1=1, dim2=2)).all():
                raise GemmaAwqError(
                    f"Layer {index + 1}: what enters {name} holds NaN or infinite values; the weights are finite.",
                    "The checkpoint is damaged or its training diverged: compare it with the source's.",
                )
        return self.statistics


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for products in bfloat16 with sums in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def bfloat16_products(device: torch.device) -> AbstractContextManager[object]:
    """Linears and attention in bfloat16 where the device multiplies it, else nothing.

    For what is only observed: the rounding of the inputs is noise of 0.4 %, independent from token to token.
    """
    return torch.autocast(device.type, torch.bfloat16) if multiplies_bfloat16(device) else nullcontext()


def token_weights(output: Tensor, normalized: bool) -> Tensor:
    """How much an error at each token counts: [R, S], the mean over a row's tokens after the BOS is 1.

    output: [R, S, N] of the linear; normalized: whether a norm follows it.
    """
    weights = torch.ones(output.shape[:2], device=output.device)
    if normalized:
        tiny = torch.finfo(torch.float32).tiny
        weights = output.to(torch.float32).square().mean(-1).clamp_(min=tiny).reciprocal_()
        weights /= weights[:, 1:].mean(1, keepdim=True)
    weights[:, 0] = BOS_WEIGHT
    return weights
