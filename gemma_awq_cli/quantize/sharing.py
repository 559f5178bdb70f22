"""Layers shared out over processes, where no layer depends on how others were quantized.

At qualities whose statistics are of the 16-bit path alone, a layer needs nothing but its input on that path. So every
process runs the calibration rows through the 16-bit layers, which is the small part of the work, and quantizes its
share of them. The sums are those of one process, and so are the bytes.
"""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from gemma_awq_cli.models.checkpoints.journal import LayerRecord
from gemma_awq_cli.models.forward.hidden_states import HiddenStates
from gemma_awq_cli.models.forward.memory import return_freed_memory
from gemma_awq_cli.quantize.events import LayerDone, OnEvent
from gemma_awq_cli.quantize.information_files import InformationFiles
from gemma_awq_cli.quantize.layer_files import LayerFiles
from gemma_awq_cli.quantize.layer_pass import layer_memory_errors, pass_calibration, process_layer
from gemma_awq_cli.quantize.plan import Plan
from gemma_awq_cli.quantize.preparation import Prepared

_OWN = "process-"  # how the folder of one process begins


def shares_of_layers(missing: Iterable[int], rank: int, count: int) -> list[int]:
    """Return the layers of one of `count` processes, of those that are missing: every count-th."""
    return list(missing)[rank::count]


def remove_leftovers(state: Path) -> None:
    """Remove the hidden states of processes that were lost. One that works on without the others ends for lack of them.

    state: see `WorkFolder`.
    """
    for folder in state.glob(f"{_OWN}*"):
        shutil.rmtree(folder, ignore_errors=True)


def quantize_share(
    prepared: Prepared, files: LayerFiles, state: Path, layers: Iterable[int], after_layer: Callable[[], None]
) -> None:
    """Quantize some layers into `files`.

    state: see `WorkFolder`; this process's hidden states have a folder of their own there. after_layer: called when the
    rows have passed one more layer.
    """
    plan, stack, own = prepared.plan, prepared.stack, set(layers)
    if not own:
        return
    # not named by the process's number: one that was given up for lost may still be writing to its folder
    folder = Path(tempfile.mkdtemp(prefix=_OWN, dir=state))
    information = InformationFiles(state)
    with calibration_states(prepared, folder) as hidden:
        for index in range(max(own) + 1):
            started = time.perf_counter()
            with layer_memory_errors(plan, index):
                if index in own:
                    layer = process_layer(prepared.checkpoint, stack, plan, hidden, information, index)
                    record = LayerRecord(tuple(layer.groups), round(time.perf_counter() - started, 2))
                    files.add(index, layer.tensors, record)
                    del layer
                if index not in own or plan.keeps_grid:  # which quantizes without the calibration rows
                    pass_calibration(stack, plan, hidden, index)
            return_freed_memory()
            after_layer()
    shutil.rmtree(folder, ignore_errors=True)


def calibration_states(prepared: Prepared, folder: Path) -> HiddenStates:
    """Return the hidden states of the calibration rows in front of the first layer, which no held-out rows go with."""
    rows, plan = prepared.rows, prepared.plan
    ids = rows.heldout[:1] if plan.keeps_grid else rows.ids  # a row on which the layer is proved
    both, device = plan.effort.paths == 2, prepared.stack.device if plan.holds_states else None
    hidden = HiddenStates(folder, prepared.checkpoint.shape, ids, both_paths=both, device=device)
    hidden.start(prepared.stack.embedder(torch.cat([rows.ids, rows.heldout])))
    return hidden


class SharedProgress:
    """Reports the layers that all processes finish, as their files appear."""

    def __init__(self, files: LayerFiles, plan: Plan, on_event: OnEvent) -> None:
        self._files, self._plan, self._on_event = files, plan, on_event
        self._known: set[int] = set()
        self._report(resumed=True)

    def __call__(self) -> None:
        """Look again."""
        self._report(resumed=False)

    def _report(self, resumed: bool) -> None:
        for index in self._files.finished():
            if index not in self._known and index < self._plan.layers:
                self._known.add(index)
                record = self._files.record(index)
                done = LayerDone(
                    index, self._plan.layers, record.error, record.rtn_error, record.seconds, resumed=resumed
                )
                self._on_event(done)
