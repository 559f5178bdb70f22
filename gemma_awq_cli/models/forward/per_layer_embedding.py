"""Per-layer embeddings: what each token brings to each layer, beside what the layers before made of it.

The formula is `models.gemma.architecture.PerLayerInputs`'s. The table is larger than all other weights of some models;
it stays in its file, and only the rows of the tokens that come are read.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_awq_cli.kernels.dense_products import linear
from gemma_awq_cli.kernels.plain_ops import rms_norm
from gemma_awq_cli.models.checkpoints.weight_files import require_finite
from gemma_awq_cli.models.gemma.architecture import PER_LAYER_TABLE


@dataclass(frozen=True)
class PerLayerEmbedding:
    """What is outside the layers.

    table: [vocabulary, layers * width], mapped from the file; table_scale: sqrt(width), in the dtype of the states;
    projection: [layers * width, hidden]; norm: the gain [width] float32.
    """

    table: Tensor
    table_scale: Tensor
    projection: Tensor
    norm: Tensor
    eps: float

    def rows(self, ids: Tensor) -> Tensor:
        """The scaled rows [T, layers * width] of tokens [T]; a token that the table does not have gets row 0."""
        known = torch.where(ids < len(self.table), ids, 0).to(self.table.device)
        rows = self.table[known]
        require_finite(PER_LAYER_TABLE, rows)  # the table as a whole was not read before
        return rows.to(self.table_scale.device, self.table_scale.dtype) * self.table_scale

    def of_layer(self, index: int, embedded: Tensor, rows: Tensor) -> Tensor:
        """Layer `index`'s input [T, width]. embedded: the scaled embeddings [T, hidden]; rows: what `rows` returned."""
        width = len(self.norm)
        part = slice(index * width, (index + 1) * width)
        projected = linear(embedded, self.projection[part]) * embedded.shape[-1] ** -0.5
        return (rms_norm(projected, self.norm, self.eps) + rows[:, part]) * 2.0**-0.5


@dataclass(frozen=True)
class PerLayerGate:
    """One layer's use of its input. gate: [width, hidden]; projection: [hidden, width]; norm: [hidden] float32."""

    gate: Tensor
    projection: Tensor
    norm: Tensor
    eps: float

    def output(self, x: Tensor, layer_input: Tensor) -> Tensor:
        """What states x [T, hidden] and the layer's input [T, width] add to the residual stream: [T, hidden]."""
        gated = F.gelu(linear(x, self.gate), approximate="tanh") * layer_input
        return rms_norm(linear(gated, self.projection), self.norm, self.eps)
