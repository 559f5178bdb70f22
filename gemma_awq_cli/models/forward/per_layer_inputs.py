"""The per-layer inputs of one layer at a time (Gemma 3n; Gemma 4 E2B and E4B), for a model whose layers run in turn.

They follow from the tokens alone, and a layer's from its own slices of the table and of the projection. So they are
computed when the layer runs, from the rows of its tokens.
"""

import torch
from torch import Tensor

from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.expected_tensors import EMBEDDING
from gemma_awq_cli.models.forward.per_layer_embedding import PerLayerEmbedding
from gemma_awq_cli.models.gemma.architecture import PER_LAYER_NORM, PER_LAYER_PROJECTION, PER_LAYER_TABLE
from gemma_awq_cli.system.arrays import as_tensor


class PerLayerInputs:
    """The per-layer inputs of one checkpoint's language model, which must have them, in float32."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        assert checkpoint.shape.per_layer is not None
        self._width = checkpoint.shape.per_layer.width
        self._eps = float(checkpoint.facts.rms_norm_eps)
        self._embedding, self._table = (as_tensor(checkpoint.mapped(name)) for name in (EMBEDDING, PER_LAYER_TABLE))
        small = checkpoint.read([PER_LAYER_PROJECTION, PER_LAYER_NORM])
        self._projection, self._gain = small[PER_LAYER_PROJECTION], small[PER_LAYER_NORM]

    def of_layer(self, index: int, ids: Tensor, device: torch.device) -> Tensor:
        """Return the input of layer `index` for token ids [R, S]: [R, S, width] float32 on the device."""
        used, place = torch.unique(ids, return_inverse=True)
        own = slice(index * self._width, (index + 1) * self._width)
        layer = PerLayerEmbedding(
            self._table[:, own],
            torch.tensor(self._width**0.5, device=device),
            self._projection[own].to(device, torch.float32),
            self._gain.to(device, torch.float32),
            self._eps,
        )
        embedded = self._embedding[used.to("cpu")].to(device, torch.float32) * self._embedding.shape[1] ** 0.5
        with torch.autocast(device.type, enabled=False):  # they are few, and used by every row
            return layer.of_layer(0, embedded, layer.rows(used))[place.to(device)]
