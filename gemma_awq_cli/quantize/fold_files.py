"""What each linear's weight was multiplied by before it was rounded: a file per layer, for choosing afterwards.

With it, a linear of a finished artifact can be put back in 16 bits as its layer's folds want it, without quantizing
the layer again.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.journal import ANEW
from gemma_awq_cli.models.gemma.layers import LayerLayout
from gemma_awq_cli.quantize.layer import QuantizedLayer
from gemma_awq_cli.system.saving import appearing_whole


class Factors(NamedTuple):
    """columns: [K]; rows: [N, 1] or [1, 1]. float32."""

    columns: Tensor
    rows: Tensor


_NONE = torch.empty(0)


class FoldFiles:
    """The files of one quantization, in a folder of their own. Each appears whole, when it is on the disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self) -> None:
        """Make the folder, if it is not there."""
        self.folder.mkdir(exist_ok=True)

    def add(self, index: int, layout: LayerLayout, layer: QuantizedLayer) -> None:
        """Add the factors of a layer's linears, without those of experts."""
        tensors = {}
        for name in layout.linears:
            tensors[f"{name}.columns"] = layer.columns[name].cpu().contiguous().clone()
            tensors[f"{name}.rows"] = layer.rows[name].cpu().contiguous().clone()
        with appearing_whole(self._path(index)) as path:
            path.write_bytes(save(tensors))

    def read(self, index: int, layout: LayerLayout) -> dict[str, Factors]:
        """Return the factors by the linears' names in the layer. Raises GemmaAwqError for a missing or damaged file."""
        path = self._path(index)
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise GemmaAwqError(f"{path} is missing or damaged: {error}", ANEW) from error
        found = {}
        for name, linear in layout.linears.items():
            factors = Factors(*(tensors.get(f"{name}.{kind}", _NONE) for kind in Factors._fields))
            fits = tuple(factors.columns.shape) == (linear.inputs,)
            if not fits or tuple(factors.rows.shape) not in ((linear.outputs, 1), (1, 1)):
                raise GemmaAwqError(f"{path} is damaged: it does not fit {name}.", ANEW)
            found[name] = factors
        return found

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:05d}.safetensors"
