"""A layer's experts: a router sends each token to a few of many gated MLPs, and their outputs are mixed."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemma_awq_cli.kernels.plain_ops import rms_norm


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
        shares = torch.softmax(F.linear(scaled, self.weight), -1, dtype=torch.float32)
        weights, chosen = shares.topk(self.active, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        return chosen, weights * self.per_expert_scale[chosen]


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
        mixed = mix_experts(normed, *self.router.choose(x), self.gate_up, self.down)
        return rms_norm(dense, self.dense_norm, self.eps) + rms_norm(mixed, self.output_norm, self.eps)


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
