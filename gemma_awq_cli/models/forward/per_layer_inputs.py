"""Per-layer inputs: what each layer is given of a token beside the hidden states (Gemma 3n; Gemma 4 E2B and E4B).

They follow from the token alone, and a layer's from its own slices of two matrices: the table of per-layer embeddings,
of which a token needs one row, and the projection of the token's embedding. So they are computed when a layer runs. The
table is larger than all 4-bit weights together; it is mapped from its file, and only the rows in use are read.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm

from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.weight_files import require_finite
from gemma_awq_cli.models.gemma.architecture import PER_LAYER_NORM, PER_LAYER_PROJECTION, PER_LAYER_TABLE

_EMBEDDING = "model.embed_tokens.weight"


def per_layer_input(embedded: Tensor, entries: Tensor, projection: Tensor, gain: Tensor, eps: float) -> Tensor:
    """Return one layer's input for some tokens: [..., width], (norm(P e / sqrt(hidden)) + sqrt(width) T) / sqrt(2).

    embedded: e [..., hidden], their scaled embeddings; entries: T [..., width], the layer's slice of their rows of the
    table; projection: P [width, hidden], the layer's rows of the projection; gain: [width], of the norm. All of one
    floating-point dtype.
    """
    width, hidden = projection.shape
    projected = rms_norm(linear(embedded, projection) * hidden**-0.5, (width,), gain, eps)
    return (projected + entries * width**0.5) * 2**-0.5


class PerLayerInputs:
    """The per-layer inputs of one checkpoint's language model, which must have them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        shape = checkpoint.shape
        assert shape.per_layer is not None
        self._vocabulary, self._width = shape.per_layer.vocabulary, shape.per_layer.width
        self._scale = shape.hidden**0.5
        self._eps = float(checkpoint.facts.rms_norm_eps)
        self._embedding, self._table = checkpoint.mapped(_EMBEDDING), checkpoint.mapped(PER_LAYER_TABLE)
        small = checkpoint.read([PER_LAYER_PROJECTION, PER_LAYER_NORM])
        self._projection, self._gain = small[PER_LAYER_PROJECTION], small[PER_LAYER_NORM]

    def of_layer(self, index: int, ids: Tensor, device: torch.device) -> Tensor:
        """Return the input of layer `index` for token ids [R, S]: [R, S, width] float32 on the device."""
        used, place = torch.unique(ids, return_inverse=True)
        used = used.to("cpu")
        own = slice(index * self._width, (index + 1) * self._width)
        in_table = torch.where(used < self._vocabulary, used, 0)  # as transformers' Gemma 3n does
        parts = {
            "embedded": self._embedding[used],
            "entries": self._table[:, own][in_table],
            "projection": self._projection[own],
            "gain": self._gain,
        }
        require_finite(PER_LAYER_TABLE, parts["entries"])
        real = {name: part.to(device, torch.float32) for name, part in parts.items()}
        real["embedded"] = real["embedded"] * self._scale
        with torch.autocast(device.type, enabled=False):  # they are few, and used by every row
            return per_layer_input(**real, eps=self._eps)[place.to(device)]
