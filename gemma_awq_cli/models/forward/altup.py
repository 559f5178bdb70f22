"""Alternating updates (AltUp) and Laurel, the two ways in which Gemma 3n widens its residual stream.

The hidden states are several streams [streams, T, hidden]. Each layer predicts all of them from all, computes with one,
and corrects the others by how far that one came out from its prediction. A router makes the coefficients of each token.
Sources: arXiv:2301.13310 (AltUp), arXiv:2411.07501 (Laurel).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_awq_cli.kernels.dense_products import linear
from gemma_awq_cli.kernels.plain_ops import rms_norm

_LEAST_SQUARE = 1e-5  # of a projected stream's mean square, so that dividing by it is safe


@dataclass(frozen=True)
class AltUpWeights:
    """AltUp and Laurel of one layer, with `streams` S. The gains are [hidden] float32.

    predict: [S * S, S]; correct: [S, S]; router: [S, hidden]; output_scale: [hidden], None: not scaled;
    left: [rank, hidden]; right: [hidden, rank].
    """

    predict: Tensor
    correct: Tensor
    router: Tensor
    router_norm: Tensor
    output_scale: Tensor | None
    left: Tensor
    right: Tensor
    laurel_norm: Tensor
    active: int
    eps: float


def predict_streams(weights: AltUpWeights, streams: Tensor) -> Tensor:
    """Each stream [S, T, hidden] plus a mixture of all."""
    count = len(streams)
    mixture = linear(_modalities(weights, streams[weights.active]), weights.predict)  # [T, S * S]
    mixture = mixture.unflatten(-1, (count, count)).transpose(1, 2)
    return torch.matmul(streams.permute(1, 2, 0), mixture).permute(2, 0, 1) + streams


def correct_streams(weights: AltUpWeights, predicted: Tensor, computed: Tensor) -> Tensor:
    """The predicted streams [S, T, hidden], corrected by what the layer computed [T, hidden] for the active one."""
    surprise = computed - predicted[weights.active]
    share = linear(_modalities(weights, computed), weights.correct) + 1.0  # [T, S]
    return surprise * share.t()[:, :, None] + predicted


def _modalities(weights: AltUpWeights, x: Tensor) -> Tensor:
    """What the router makes of each token [T, hidden]: [T, S]."""
    routed = linear(rms_norm(x, weights.router_norm, weights.eps) * (1.0 / x.shape[-1]), weights.router)
    return torch.tanh(routed.to(torch.float32)).to(x.dtype)


def laurel(weights: AltUpWeights, x: Tensor) -> Tensor:
    """The learned augmented residual: the normed input [T, hidden] itself plus its projection through a low rank."""
    return x + rms_norm(linear(linear(x, weights.left), weights.right), weights.laurel_norm, weights.eps)


def start_streams(embedded: Tensor, projections: Sequence[Tensor]) -> Tensor:
    """The first layer's streams [S, T, hidden] of embedded tokens [T, hidden]. projections: one per further stream."""
    return torch.stack([embedded, *(_projected(embedded, weight, embedded) for weight in projections)])


def join_streams(streams: Tensor, projections: Sequence[Tensor]) -> Tensor:
    """The state [T, hidden] that the last layer's streams [S, T, hidden] are together."""
    further = zip(streams[1:], projections, strict=True)
    return torch.stack([streams[0], *(_projected(x, weight, streams[0]) for x, weight in further)]).mean(0)


def _projected(x: Tensor, weight: Tensor, like: Tensor) -> Tensor:
    """x [T, hidden] projected, and made as large as `like` [T, hidden]."""
    made = linear(x, weight)
    size = made.square().mean(-1, keepdim=True).clamp(min=_LEAST_SQUARE).sqrt()
    return made * like.square().mean(-1, keepdim=True) ** 0.5 / size
