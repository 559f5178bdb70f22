"""The head (lm_head): hidden states to logits, the largest single read of memory for a token.

A quantized copy of it may be used; the embedding's look-up always reads the 16-bit weight. Its groups run along the
hidden size: 8 bits are symmetric, 4 bits have a zero point. Four bits alone would cost accuracy, so the largest logits,
which hold practically all of the probability, are recomputed from the 16-bit weight: about a thousand of its rows
instead of 256 thousand.
"""

from functools import cache

import torch
from torch import Tensor, nn

from gemma_awq_cli.awq.grid import minmax_grid, quantize
from gemma_awq_cli.awq.packed_arrays import PACK
from gemma_awq_cli.awq.packing import PackedWeight, pack_weight
from gemma_awq_cli.kernels.dense_products import linear
from gemma_awq_cli.kernels.head_kinds import DENSE_HEAD, head_group
from gemma_awq_cli.kernels.known_numbers import problem_in
from gemma_awq_cli.kernels.packed_linear import make_linear

REFINED = 1024  # tokens whose logits a 4-bit head recomputes
KNOWN_TOLERANCE = 0.02  # of the product of known numbers: 8 bits round by less than 1 %
_ROWS = 8192  # vocabulary entries that are quantized at a time


class DenseHead(nn.Module):
    """A head with the 16-bit weight [V, K]."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class Int8Head(nn.Module):
    """PyTorch's own int8 product for bfloat16 activations: one scale per vocabulary entry."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.scales = torch.empty(weight.shape[0], dtype=torch.bfloat16, device=weight.device)
        self.q = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        for first in range(0, weight.shape[0], _ROWS):
            rows = weight[first : first + _ROWS].to(torch.float32)
            scale = (rows.abs().amax(1) / 127).to(torch.bfloat16)
            self.scales[first : first + _ROWS] = scale
            q = torch.round(rows / scale.to(torch.float32).clamp_min(1e-30)[:, None]).clamp_(-127, 127)
            self.q[first : first + _ROWS] = q.to(torch.int8)

    def forward(self, x: Tensor) -> Tensor:
        return torch._weight_int8pack_mm(x.contiguous(), self.q, self.scales)


class RefinedHead(nn.Module):
    """A coarse head, and the 16-bit weight for the tokens that it finds most likely."""

    def __init__(self, coarse: nn.Module, weight: Tensor) -> None:
        super().__init__()
        self.coarse = coarse
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.coarse(x)  # [R, V]
        likely = logits.topk(min(REFINED, logits.shape[1])).indices
        exact = (self.weight[likely] @ x[:, :, None])[:, :, 0]
        return logits.scatter(1, likely, exact.to(logits.dtype))


def make_head(weight: Tensor, head: str) -> nn.Module:
    """Return a module hidden [R, K] -> logits [R, V]. head: one of `HEADS`; 16-bit if `head_refusal` has a reason."""
    if head == DENSE_HEAD or head_refusal(weight, head):
        return DenseHead(weight)
    if head == "int8":
        return Int8Head(weight)
    group = head_group(head, weight.shape[1])
    assert group is not None
    parts = []  # packed at once: as integers of 32 bits the whole of them would take 4 bytes each
    for rows in weight.split(_ROWS):
        wide = rows.to(torch.float32)
        grid = minmax_grid(wide, group)
        parts.append(pack_weight(quantize(wide, grid), grid))
    packed = PackedWeight(*(torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True)))
    return RefinedHead(make_linear(packed, weight.device, weight.dtype), weight)


@cache
def _int8_problem(device: torch.device) -> str | None:
    """Why torch's int8 product is not to be used on a device, or None: off the CPU it is tried on known numbers."""
    if device.type == "cpu":
        return None
    generator = torch.Generator("cpu").manual_seed(0)
    weight, x = (torch.randn(rows, 128, generator=generator).to(torch.bfloat16) for rows in (64, 3))
    expected = x.float() @ weight.float().t()

    def multiply() -> str | None:
        found = Int8Head(weight.to(device))(x.to(device)).cpu().float()
        if (found - expected).norm() <= KNOWN_TOLERANCE * expected.norm():
            return None
        return "torch's int8 product multiplies known numbers wrongly here"  # also if it is NaN

    return problem_in(multiply, "torch's int8 product fails here")


def soft_cap(logits: Tensor, cap: float | None) -> Tensor:
    """`cap * tanh(logits / cap)`, in place; the logits as they are without a cap."""
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


def head_refusal(weight: Tensor, head: str) -> str | None:
    """Why the weight [V, K] cannot be quantized as `head` for torch, or None."""
    if weight.dtype != torch.bfloat16:
        return "torch's quantized heads compute in bfloat16 only"
    if head == "int8" and (problem := _int8_problem(weight.device)):
        return problem
    if head == "int4" and (head_group(head, weight.shape[1]) is None or weight.shape[0] % PACK):
        return "no group size fits the shape"
    return None
