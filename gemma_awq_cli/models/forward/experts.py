"""A layer's experts: a router sends each token to a few of many gated MLPs, and their outputs are mixed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemma_awq_cli.awq.grid import dequantize
from gemma_awq_cli.awq.packing import PackedWeight, unpack_weight
from gemma_awq_cli.kernels.dense_products import linear
from gemma_awq_cli.kernels.plain_ops import rms_norm
from gemma_awq_cli.kernels.reference import ReferenceLinear

FEW_TOKENS = 32  # whose experts' weights are copied for each token, so that the host need not know which they are


@dataclass(frozen=True)
class Router:
    """weight: [experts, hidden]; scale: [hidden]; per_expert_scale: [experts]; active: experts per token."""

    weight: Tensor
    scale: Tensor
    per_expert_scale: Tensor
    active: int
    eps: float

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The experts of each token [T, active] and the weights of their outputs [T, active] float32.

        x: [T, hidden], the residual stream itself: not behind the experts' norm.
        """
        scaled = rms_norm(x, None, self.eps) * self.scale * x.shape[-1] ** -0.5
        shares = torch.softmax(linear(scaled, self.weight), -1, dtype=torch.float32)
        weights, chosen = shares.topk(self.active, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        return chosen, weights * self.per_expert_scale[chosen]


class StackedLinears(Sequence[nn.Module]):
    """One linear of each expert, their weights in one tensor, so that a device can choose without the host.

    weight: [experts, N, K], or the tensors of a file's packed linears, those of all experts stacked.
    """

    def __init__(self, weight: Tensor | PackedWeight) -> None:
        self._weight = weight

    def __len__(self) -> int:
        return len(self._weight if isinstance(self._weight, Tensor) else self._weight.qweight)

    def __getitem__(self, expert: Any) -> Any:
        if isinstance(self._weight, Tensor):
            return DenseLinear(self._weight[expert])
        return ReferenceLinear(PackedWeight(*(tensor[expert] for tensor in self._weight)))

    def of_pairs(self, x: Tensor, experts: Tensor) -> Tensor:
        """The outputs [P, N] of the linears of experts [P] for one input each, x [P, K]."""
        if isinstance(self._weight, Tensor):
            weight = self._weight[experts]
        else:
            qweight, qzeros, scales = (tensor[experts].flatten(0, 1) for tensor in self._weight)
            # all groups of the pairs' weights, one pair behind the other: [N, P K]
            dense = dequantize(*unpack_weight(PackedWeight(qweight, qzeros, scales))).to(x.dtype)
            weight = dense.unflatten(1, (len(experts), -1)).transpose(0, 1)
        return torch.matmul(weight, x[:, :, None])[:, :, 0]


class DenseLinear(nn.Module):
    """A 16-bit linear. weight: [N, K]."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


@dataclass(frozen=True)
class Experts:
    """The experts of one layer and the norms around them, whose gains are [hidden] float32.

    gate_up, down: a linear per expert; the rows of the gate come first. dense_norm: of the dense MLP's output.
    """

    router: Router
    gate_up: Sequence[nn.Module]
    down: Sequence[nn.Module]
    dense_norm: Tensor
    input_norm: Tensor
    output_norm: Tensor
    eps: float

    def beside(self, dense: Tensor, x: Tensor) -> Tensor:
        """The dense MLP's output and the experts' together: [T, hidden]. x: [T, hidden], the residual stream."""
        normed = rms_norm(x, self.input_norm, self.eps)
        chosen, weights = self.router.choose(x)
        if isinstance(self.gate_up, StackedLinears) and isinstance(self.down, StackedLinears) and len(x) <= FEW_TOKENS:
            mixed = mix_chosen(normed, chosen, weights, self.gate_up, self.down)
        else:
            mixed = mix_experts(normed, chosen, weights, self.gate_up, self.down)
        return rms_norm(dense, self.dense_norm, self.eps) + rms_norm(mixed, self.output_norm, self.eps)


def mix_chosen(x: Tensor, chosen: Tensor, weights: Tensor, gate_up: StackedLinears, down: StackedLinears) -> Tensor:
    """What `mix_experts` returns, token by token and without the host: for the few tokens of a decode step."""
    mixed = []
    for token, experts, shares in zip(x, chosen, weights, strict=True):
        gate, up = gate_up.of_pairs(token.expand(len(experts), -1), experts).chunk(2, -1)
        output = down.of_pairs(F.gelu(gate, approximate="tanh") * up, experts)
        mixed.append((output * shares[:, None]).sum(0))
    return torch.stack(mixed).to(x.dtype)


def mix_experts(
    x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Sequence[nn.Module], down: Sequence[nn.Module]
) -> Tensor:
    """The weighted sum [T, hidden] of the chosen experts' outputs. Each expert reads all its tokens at once.

    x: [T, hidden], the normed input; chosen, weights: [T, active]; gate_up, down: a linear per expert.
    """
    order = chosen.flatten().argsort(stable=True)  # of the pairs of a token and an expert, by expert
    tokens = order // chosen.shape[1]
    counts = chosen.flatten().bincount(minlength=len(gate_up)).tolist()
    shares = weights.flatten()[order]
    result = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    for expert, (own, share) in enumerate(zip(tokens.split(counts), shares.split(counts), strict=True)):
        if len(own):
            gate, up = gate_up[expert](x[own]).chunk(2, -1)
            output = down[expert](F.gelu(gate, approximate="tanh") * up)
            result.index_add_(0, own, (output * share[:, None]).to(result.dtype))
    return result.to(x.dtype)
