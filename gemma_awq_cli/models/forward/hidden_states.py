"""The hidden states of all rows between two layers, kept on the disk: any number of rows takes no memory.

Two files take turns. A layer reads its input from one and writes its output to the other, so its input is complete
until its output is, and a run that was killed inside a layer repeats that layer from the same bytes. Keys and values
that later layers share have a file for each layer that they come from, which only that layer writes.

Rows take one of two paths: the reference path through the 16-bit layers, or the quantized path through the layers that
are written.
"""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from gemma_awq_cli.models.checkpoints.weight_files import raw_bytes
from gemma_awq_cli.models.forward.held_rows import FLOAT32, Behind, HeldRows, RowFile
from gemma_awq_cli.models.forward.layerwise import KeysAndValues
from gemma_awq_cli.models.gemma.architecture import TextShape

STATE_FILES = 2  # that take turns

# From hidden states, token ids and shared keys and values to the layer's output: see `TextStack.run_layer`.
Run = Callable[[Tensor, Tensor, KeysAndValues], Tensor]


def state_bytes(shape: TextShape, tokens: int) -> int:
    """Return how many bytes the files of `HiddenStates` take for a number of tokens in all sets together."""
    streams = 1 if shape.altup is None else shape.altup.streams
    keys_and_values = sum(2 * shape.layouts[index].kv_size for index in shape.kv_sources)
    return tokens * FLOAT32 * (STATE_FILES * streams * shape.hidden + keys_and_values)


class HiddenStates:
    """Rows [R, S, hidden], or [R, streams, S, hidden] with AltUp, in a folder, in four sets, each a slice of R.

    calibration, heldout: the rows to calibrate on and the rows to measure on, on the reference path; heldout_quantized:
    the held-out rows on the quantized path; calibration_quantized: the calibration rows on it, empty unless
    `both_paths`.

    calibration_ids, heldout_ids: [R, S], their tokens. device: which also holds what is written, if it has the memory;
    closing ends that.
    """

    def __init__(
        self,
        folder: Path,
        shape: TextShape,
        calibration_ids: Tensor,
        heldout_ids: Tensor | None = None,
        both_paths: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self.seq_len = seq_len = calibration_ids.shape[1]
        sets = [calibration_ids, *([heldout_ids] * 2 if heldout_ids is not None else [])]
        sets += [calibration_ids] if both_paths else []
        self._ids = torch.cat(sets)
        calibration, heldout = len(calibration_ids), 0 if heldout_ids is None else len(heldout_ids)
        self.calibration = slice(0, calibration)
        self.heldout = slice(calibration, calibration + heldout)
        self.heldout_quantized = slice(self.heldout.stop, self.heldout.stop + heldout)
        self.calibration_quantized = slice(self.heldout_quantized.stop, len(self._ids))
        streams = () if shape.altup is None else (shape.altup.streams,)
        self._behind = None if device is None else Behind()

        def rows(name: str, row: tuple[int, ...]) -> RowFile | HeldRows:
            file = RowFile(folder / f"{name}.f32", row)
            if device is None or self._behind is None:
                return file
            return HeldRows(file, len(self._ids), device, self._behind)

        self._files = tuple(rows(f"hidden-{i}", (*streams, seq_len, shape.hidden)) for i in range(STATE_FILES))
        self._sources = [layout.kv_source for layout in shape.layouts]
        self._shared = {
            index: rows(f"shared-{index}", (2, layout.kv_heads, seq_len, layout.head_dim))
            for index, layout in enumerate(shape.layouts)
            if index in shape.kv_sources
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._behind is not None:
            try:
                if error is None:
                    self._behind.wait()
            finally:
                self._behind.close()

    def start(self, embed: Callable[[Tensor], Tensor]) -> None:
        """Write the input of layer 0 for all rows. embed: returns the hidden states of token ids."""
        with self._files[0].path.open("wb") as file:
            for row in self._ids.split(1):
                file.write(raw_bytes(embed(row)))
        for later in (self._files[1], *self._shared.values()):
            later.path.touch()

    def read(self, layer: int, rows: slice) -> Tensor:
        """Return rows of the input of layer `layer`: [R', S, hidden] or [R', streams, S, hidden] float32."""
        return self._files[layer % 2].read(rows)

    def read_batch(self, layer: int, rows: slice) -> tuple[Tensor, Tensor, KeysAndValues]:
        """Return rows of all that layer `layer` reads, as a `Run` takes it."""
        shared: KeysAndValues = {}
        if (source := self._sources[layer]) is not None:
            keys, values = self._shared[source].read(rows).unbind(1)
            shared[source] = keys, values
        return self.read(layer, rows), self._ids[rows], shared

    def require_begun(self, layer: int, layers: int) -> None:
        """Raise unless an interrupted run left what layer `layer` of `layers` reads, and the files for its output."""
        # after the last layer nobody reads the calibration rows
        rows = (self.calibration_quantized if layer < layers else self.heldout_quantized).stop
        self._files[layer % 2].require(rows)
        self._files[1 - layer % 2].require(0)
        for index, file in self._shared.items():
            file.require(rows if index < layer else 0)

    def advance(self, layer: int, rows: slice, batch: int, run: Run, paired: slice | None = None) -> None:
        """Run `rows` through layer `layer`, `batch` rows at a time, and write them as the next layer's input.

        paired: the same number of other rows. `run` then gets [rows of the batch, their paired rows], and only the
        outputs of the former are written.
        """
        for first in range(rows.start, rows.stop, batch):
            own = slice(first, min(first + batch, rows.stop))
            hidden, ids, shared = self.read_batch(layer, own)
            if paired is not None:
                shift = paired.start - rows.start
                other, ids_again, beside = self.read_batch(layer, slice(own.start + shift, own.stop + shift))
                hidden, ids = torch.cat([hidden, other]), torch.cat([ids, ids_again])
                shared = {
                    index: (torch.cat([keys, beside[index][0]]), torch.cat([values, beside[index][1]]))
                    for index, (keys, values) in shared.items()
                }
            output, count = run(hidden, ids, shared), own.stop - own.start
            self._files[1 - layer % 2].write(first, output[:count])
            if layer in self._shared:
                self._shared[layer].write(first, torch.stack([part[:count] for part in shared[layer]], dim=1))

    def branch(self, layer: int, rows: slice, first: int, batch: int, run: Run) -> None:
        """Run `rows` through layer `layer` for other rows, from row `first` on, whose own input is not read.

        They get what earlier layers share of `rows`, too.
        """
        for start in range(rows.start, rows.stop, batch):
            own = slice(start, min(start + batch, rows.stop))
            to = first + own.start - rows.start
            hidden, ids, shared = self.read_batch(layer, own)
            self._files[1 - layer % 2].write(to, run(hidden, ids, shared))
            if layer in self._shared:
                self._shared[layer].write(to, torch.stack(shared[layer], dim=1))
            for index, file in self._shared.items():
                if index < layer:
                    file.write(to, file.read(own))

    def sync(self, layer: int) -> None:
        """Force the input of layer `layer`, and what the layer before it shares, to the disk."""
        self._files[layer % 2].sync()
        if layer - 1 in self._shared:
            self._shared[layer - 1].sync()
