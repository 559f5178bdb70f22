"""The hidden states of all rows between two layers, kept on the disk: any number of rows takes no memory.

Two files take turns. A layer reads its input from one and writes its output to the other, so its input is complete
until its output is, and a run that was killed inside a layer repeats that layer from the same bytes.

Rows take one of two paths: the reference path through the 16-bit layers, or the quantized path through the layers that
are written.
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
    """Rows [R, S, hidden] float32 in a folder, in four sets, each a slice of R.

    calibration, heldout: the rows to calibrate on and the rows to measure on, on the reference path; heldout_quantized:
    the held-out rows on the quantized path; calibration_quantized: the calibration rows on it, empty unless
    `both_paths`.
    """

    def __init__(
        self, folder: Path, calibration: int, heldout: int, seq_len: int, hidden: int, both_paths: bool = False
    ) -> None:
        self.calibration = slice(0, calibration)
        self.heldout = slice(calibration, calibration + heldout)
        self.heldout_quantized = slice(self.heldout.stop, self.heldout.stop + heldout)
        again = calibration if both_paths else 0
        self.calibration_quantized = slice(self.heldout_quantized.stop, self.heldout_quantized.stop + again)
        self._row = (seq_len, hidden)
        self._files = (folder / "hidden-0.f32", folder / "hidden-1.f32")

    def start(self, ids: Tensor, embed: Callable[[Tensor], Tensor]) -> None:
        """Write the input of layer 0 for all rows.

        ids: [R', S], the calibration rows and then the held-out rows; embed: returns the hidden states of token ids.
        """
        again = slice(0, self.calibration_quantized.stop - self.calibration_quantized.start)
        with self._files[0].open("wb") as file:
            for rows in (self.calibration, self.heldout, self.heldout, again):
                for row in ids[rows].split(1):
                    file.write(raw_bytes(embed(row)))
        self._files[1].touch()

    def read(self, layer: int, rows: slice) -> Tensor:
        """Return rows of the input of layer `layer`: [R', S, hidden] float32."""
        result = torch.empty((rows.stop - rows.start, *self._row), dtype=torch.float32)
        with self._files[layer % 2].open("rb") as file:
            file.seek(rows.start * result[:1].nbytes)
            if file.readinto(raw_bytes(result)) != result.nbytes:
                raise GemmaAwqError(f"{file.name} is too short: something changed it during the run.", ANEW)
        return result

    def require_begun(self, layer: int, layers: int) -> None:
        """Raise unless an interrupted run left the input of layer `layer` of `layers`, and the file for its output."""
        row = self._row[0] * self._row[1] * 4
        # after the last layer nobody reads the calibration rows
        rows = (self.calibration_quantized if layer < layers else self.heldout_quantized).stop
        for path, least in ((self._files[layer % 2], rows * row), (self._files[1 - layer % 2], 0)):
            require_regular(path, ANEW)
            if path.stat().st_size < least:
                raise GemmaAwqError(f"{path} is too short: something changed it since.", ANEW)

    def advance(
        self, layer: int, rows: slice, batch: int, run: Callable[[Tensor], Tensor], paired: slice | None = None
    ) -> None:
        """Run `rows` through layer `layer`, `batch` rows at a time, and write them as the next layer's input.

        paired: the same number of other rows. `run` then gets [rows of the batch, their paired rows], and only the
        outputs of the former are written.
        """
        with self._files[1 - layer % 2].open("r+b") as file:
            for first in range(rows.start, rows.stop, batch):
                own = slice(first, min(first + batch, rows.stop))
                hidden = self.read(layer, own)
                if paired is not None:
                    shift = paired.start - rows.start
                    hidden = torch.cat([hidden, self.read(layer, slice(own.start + shift, own.stop + shift))])
                file.seek(first * hidden[:1].nbytes)
                file.write(raw_bytes(run(hidden)[: own.stop - own.start]))

    def sync(self, layer: int) -> None:
        """Force the input of layer `layer` to the disk."""
        with self._files[layer % 2].open("r+b") as file:
            os.fsync(file.fileno())
