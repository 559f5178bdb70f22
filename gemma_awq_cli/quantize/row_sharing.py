"""Calibration rows shared out over processes, where each layer is corrected for how those before it were quantized.

At such a quality no layer can begin before the one before it is done, so all processes work on the same layer: each
runs its share of the calibration rows through it, the sums over the rows are added up, and each rounds its share of the
outputs. The first process holds the held-out rows too, and writes. The sums are added in another order than one
process's, so the number of processes belongs to what the bytes depend on.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from gemma_awq_cli.awq.row_shares import ALONE, RowShares
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.forward.hidden_states import HiddenStates
from gemma_awq_cli.models.forward.memory import return_freed_memory
from gemma_awq_cli.quantize.information_files import InformationFiles
from gemma_awq_cli.quantize.layer_pass import layer_memory_errors, process_layer
from gemma_awq_cli.quantize.preparation import Prepared
from gemma_awq_cli.system.locking import Lock

_OWN = "rows-"  # how the folder of a process but the first begins; its number follows


def quantize_own_rows(prepared: Prepared, state: Path, done: int, shares: RowShares) -> None:
    """Do the share of a process but the first in all layers from number `done` on.

    state: see `WorkFolder`; this process's hidden states have a folder of their own there, which a resumed run reads.
    """
    plan, information = prepared.plan, InformationFiles(state)
    with _own_folder(state, shares.rank) as folder, row_states(prepared, folder, done, shares) as hidden:
        for index in range(done, plan.layers):
            with layer_memory_errors(plan, index):
                process_layer(prepared.checkpoint, prepared.stack, plan, hidden, information, index, shares)
            hidden.sync(index + 1)
            with recording(shares):
                pass
            return_freed_memory()


@contextmanager
def recording(shares: RowShares) -> Iterator[None]:
    """Record inside that a layer is done. Every process enters this when its own part of the layer is on the disk.

    A process that goes on overwrites what the layer was made from, so all wait for the record too.
    """
    shares.wait()
    yield
    shares.wait()


@contextmanager
def _own_folder(state: Path, rank: int) -> Iterator[Path]:
    """The folder of one process, locked: another of its number may live yet that was given up for lost."""
    folder = state / f"{_OWN}{rank}"
    folder.mkdir(exist_ok=True)
    lock = Lock(folder / "lock")
    if not lock.acquire():
        raise GemmaAwqError(
            f"An earlier process {rank} of this run is still there, although it was given up for lost.",
            "Stop it first.",
        )
    try:
        yield folder
    finally:
        lock.release()


def row_states(
    prepared: Prepared, folder: Path, done: int, shares: RowShares = ALONE, calibrates: bool = True
) -> HiddenStates:
    """Return the hidden states of this process's calibration rows in front of the first layer that is not done.

    The first process holds the held-out rows too. done: how many layers are. calibrates: whether the calibration rows
    are needed.
    """
    stack, rows, plan = prepared.stack, prepared.rows, prepared.plan
    heldout = rows.heldout if shares.rank == 0 else None
    own = rows.ids[shares.own(len(rows.ids) if calibrates else 0)]
    both, device = plan.effort.paths == 2, stack.device if plan.holds_states else None
    hidden = HiddenStates(folder, prepared.checkpoint.shape, own, heldout, both, device)
    if done:
        hidden.require_begun(done, plan.layers)
    else:
        hidden.start(stack.embedder(torch.cat([rows.ids, rows.heldout])))
    return hidden
