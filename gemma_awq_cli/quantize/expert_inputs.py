"""What enters the experts of a layer while the calibration rows run through it, kept until each has been quantized.

The Gram matrices of all experts of a layer would take gigabytes, so the tokens are kept instead, with their routes: the
matrices of one expert at a time are summed from them. A token's output of an expert is multiplied by its routing weight
before it is added, so a squared error counts with the square of that weight.

An expert that fewer tokens reach than it has input channels is starved: its Gram matrix lacks rank. The tokens that it
lacks are made up for by all tokens of the layer, as if that many more had been routed to it at random.

With a correction for the layers before, a token takes other routes on the two paths, and an expert that it reaches on
one of them only has no output to be corrected towards. Everything here is of the quantized path then, and the weights
of experts are not corrected.
"""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from gemma_awq_cli.awq.gram import IN_TORCH, InputStatistics, Sums, block_width
from gemma_awq_cli.awq.precision import matmul_precision
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.gemma.layers import Experts, LayerLayout
from gemma_awq_cli.quantize.input_statistics import token_weights

TOKENS_AT_A_TIME = 4096  # of one expert
SEARCHED = 16  # the scale of all gate_up is searched on this many times the outputs that a linear's scale is


class ExpertInputs:
    """The inputs of a layer's experts, and the tokens that each expert got.

    rows: of `seq_len` tokens each, all of which run through the layer; paired: see `Observer`. Tokens are kept in
    bfloat16 on the CPU: 2 bytes per token and channel.
    """

    def __init__(
        self,
        layout: LayerLayout,
        module: nn.Module,
        group_size: int,
        gram_limit: int,
        device: torch.device,
        rows: int,
        seq_len: int,
        paired: bool = False,
        sums: Sums = IN_TORCH,
    ) -> None:
        assert layout.experts is not None
        self.experts: Experts = layout.experts
        self.tokens = rows * seq_len
        self._device, self._paired = device, paired
        self._group_size, self._gram_limit, self._sums = group_size, gram_limit, sums
        hidden, active = self.experts.hidden, self.experts.active
        self._states = torch.empty(self.tokens, hidden, dtype=torch.bfloat16)
        self._index = torch.empty(self.tokens, active, dtype=torch.int64)
        self._routing = torch.empty(self.tokens, active)  # the squared weights
        self._weights = {group.name: torch.empty(self.tokens) for group in (self.experts.gate_up, self.experts.down)}
        self._filled = 0
        self._all = self._empty(hidden)
        own = module.get_submodule("experts")
        self._activation: Any = own.act_fn
        self._hooks = [
            own.register_forward_pre_hook(self._keep_routes),
            module.get_submodule(layout.norms["post_experts_norm"].name).register_forward_pre_hook(self._keep_weights),
        ]

    def _own(self, tensor: Tensor) -> Tensor:
        return tensor.chunk(2)[1] if self._paired else tensor

    def _keep_routes(self, _: nn.Module, arguments: tuple[Tensor, Tensor, Tensor]) -> None:
        states, index, routing = map(self._own, arguments)
        part = slice(self._filled, self._filled + states.shape[0])
        self._states[part], self._index[part] = states, index
        self._routing[part] = routing.to(torch.float32).square()

    def _keep_weights(self, _: nn.Module, arguments: tuple[Tensor]) -> None:
        output = self._own(arguments[0])  # [R, S, hidden], the sum over the experts
        part = slice(self._filled, self._filled + output.shape[0] * output.shape[1])
        for group in (self.experts.gate_up, self.experts.down):
            self._weights[group.name][part] = token_weights(output, group.normalized).flatten()
        weights = self._weights[self.experts.gate_up.name][part] * self._routing[part].mean(1)
        self._all.add(self._states[part].to(self._device), weights.to(self._device))
        self._filled = part.stop

    def finish(self, index: int) -> None:
        """Stop observing layer `index`, counted from 0. Raises if the rows' activations overflowed."""
        for hook in self._hooks:
            hook.remove()
        assert self._filled == self.tokens
        self._all.finish()
        if not (torch.isfinite(self._all.gram.diagonal(dim1=1, dim2=2)).all() and torch.isfinite(self._routing).all()):
            raise GemmaAwqError(
                f"Layer {index + 1}: the input of the experts contains NaN or infinite values, although the weights "
                "are finite.",
                "The checkpoint is damaged or its training diverged. Compare its files with the original ones.",
            )

    @property
    def mean_abs(self) -> Tensor:
        """The mean of |x| over all tokens: [hidden]."""
        return self._all.mean_abs

    def lacking(self, expert: int) -> int:
        """How many tokens an expert lacks: 0 if it is not starved."""
        return max(0, self.experts.hidden - int((self._index == expert).sum()))

    def starved(self) -> tuple[int, ...]:
        """The experts that fewer tokens reached than they have input channels."""
        return tuple(expert for expert in range(self.experts.count) if self.lacking(expert))

    def gate_up(self, expert: int) -> Tensor:
        """The Gram matrix [B, k, k] of the input of an expert's gate_proj and up_proj.

        It is a mean over all tokens of the layer, so that the errors of the experts add up.
        """
        statistics = self._empty(self.experts.hidden)
        with matmul_precision("medium"):
            for states, weights in self._routed(expert, self.experts.gate_up.name):
                statistics.add(states, weights)
        statistics.finish(self.tokens)
        if lacking := self.lacking(expert):
            statistics.gram.add_(self._all.gram, alpha=lacking / self.tokens)
        return statistics.gram

    def down(self, expert: int, gate: Tensor, up: Tensor) -> InputStatistics:
        """The statistics of the input of an expert's down_proj. gate, up: its original weights [intermediate, hidden].

        The Gram matrix is a mean over all tokens, as that of `gate_up` is.
        """
        statistics = self._empty(self.experts.intermediate)
        name = self.experts.down.name
        with matmul_precision("medium"):
            for states, weights in chain(self._routed(expert, name), self._of_all(self.lacking(expert), name)):
                statistics.add(self._activation(states @ gate.t()).mul_(states @ up.t()), weights)
        statistics.finish(self.tokens)
        return statistics

    def _empty(self, width: int) -> InputStatistics:
        block = block_width(width, self._group_size, self._gram_limit)
        return InputStatistics(width, block, self._device, sums=self._sums)

    def _routed(self, expert: int, group: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the states [n, hidden] and the weights [n] of an expert's tokens."""
        tokens, slots = (self._index == expert).nonzero(as_tuple=True)
        weights = self._weights[group][tokens] * self._routing[tokens, slots]
        yield from self._parts(tokens, weights)

    def _of_all(self, count: int, group: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield states and weights of tokens that are evenly spaced among all; the weights are those of `count`."""
        sampled = min(count, self.tokens)
        tokens = torch.arange(sampled) * self.tokens // max(1, sampled)
        weights = self._weights[group][tokens] * self._routing[tokens].mean(1) * (count / max(1, sampled))
        yield from self._parts(tokens, weights)

    def _parts(self, tokens: Tensor, weights: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for part, own in zip(tokens.split(TOKENS_AT_A_TIME), weights.split(TOKENS_AT_A_TIME), strict=True):
            if len(part):
                yield self._states[part].to(self._device).to(torch.float32), own.to(self._device)
