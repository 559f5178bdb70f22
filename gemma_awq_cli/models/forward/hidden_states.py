"""The rows' hidden states between two layers, on the disk: memory does not grow with the rows, and no work is lost.

Two files take turns. A layer reads its input from one and writes its output to the other, so the input stays complete
until the output is, and a run that was killed inside a layer repeats that layer from the same bytes.
"""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.journal import ANEW
from gemma_awq_cli.models.checkpoints.weight_files import raw_bytes
from gemma_awq_cli.system.reading import require_regular


class HiddenStates:
    """Rows [R, S, hidden] float32 in a folder.

    Each set of rows is a `slice` of R. calibration: the first rows, and heldout: the rows used for measuring only, both
    on the 16-bit path; quantized: the held-out rows on the quantized path; disturbed: the calibration rows on the
    quantized path, if `both` are wanted; reference: all rows on the 16-bit path.
    """

    def __init__(
        self, folder: Path, calibration: int, heldout: int, seq_len: int, hidden: int, both: bool = False
    ) -> None:
        self.calibration = slice(0, calibration)
        self.heldout = slice(calibration, calibration + heldout)
        self.quantized = slice(calibration + heldout, calibration + 2 * heldout)
        self.disturbed = slice(self.quantized.stop, self.quantized.stop + (calibration if both else 0))
        self.reference = slice(0, calibration + heldout)
        self._row = (seq_len, hidden)
        self._files = (folder / "hidden-0.f32", folder / "hidden-1.f32")

    def start(self, ids: Tensor, embed: Callable[[Tensor], Tensor]) -> None:
        """Write every row's input to layer 0. ids: [R', S] of the reference rows; embed: ids -> states."""
        with self._files[0].open("wb") as file:
            again = slice(0, self.disturbed.stop - self.disturbed.start)
            for rows in (self.reference, self.heldout, again):
                for row in ids[rows].split(1):
                    file.write(raw_bytes(embed(row)))
        self._files[1].touch()

    def read(self, layer: int, rows: slice) -> Tensor:
        """Read rows of layer `layer`'s input: [R', S, hidden] float32."""
        result = torch.empty((rows.stop - rows.start, *self._row), dtype=torch.float32)
        with self._files[layer % 2].open("rb") as file:
            file.seek(rows.start * result[:1].nbytes)
            if file.readinto(raw_bytes(result)) != result.nbytes:
                raise GemmaAwqError(f"{file.name} is shorter than its rows: something else changed it.", ANEW)
        return result

    def require_begun(self, layer: int, layers: int) -> None:
        """An error unless an earlier run left the files that layer `layer` of `layers` reads and writes."""
        row = self._row[0] * self._row[1] * 4
        # nobody reads the calibration rows after the last layer
        rows = self.disturbed.stop if layer < layers else self.quantized.stop
        for path, least in ((self._files[layer % 2], rows * row), (self._files[1 - layer % 2], 0)):
            require_regular(path, ANEW)
            if path.stat().st_size < least:
                raise GemmaAwqError(f"{path} is shorter than its rows: it has changed since.", ANEW)

    def advance(
        self, layer: int, rows: slice, batch: int, run: Callable[[Tensor], Tensor], beside: slice | None = None
    ) -> None:
        """Write the results of `run` on `rows`, `batch` at a time, as the next layer's input.

        beside: as many other rows. Those of each batch are passed to `run` after its own; their results are dropped.
        """
        with self._files[1 - layer % 2].open("r+b") as file:
            for first in range(rows.start, rows.stop, batch):
                own = slice(first, min(first + batch, rows.stop))
                hidden = self.read(layer, own)
                if beside is not None:
                    shift = beside.start - rows.start
                    hidden = torch.cat([hidden, self.read(layer, slice(own.start + shift, own.stop + shift))])
                file.seek(first * hidden[:1].nbytes)
                file.write(raw_bytes(run(hidden)[: own.stop - own.start]))

    def sync(self, layer: int) -> None:
        """Make sure that layer `layer`'s input is on the disk."""
        with self._files[layer % 2].open("r+b") as file:
            os.fsync(file.fileno())
