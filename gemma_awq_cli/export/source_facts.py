"""What an export must say of its source: which linears are not packed, and the dtypes that hold the rest exactly."""

import torch

from gemma_awq_cli.export.source_parts import HEAD_MODULE, source_parts
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.expected_tensors import EMBEDDING


def group_size_of(checkpoint: Checkpoint) -> int:
    """Return the group size of a packed checkpoint."""
    assert checkpoint.group_size is not None
    return checkpoint.group_size


def not_converted(checkpoint: Checkpoint) -> list[str]:
    """Return `modules_to_not_convert`: the family's, and linears that artifacts pack and this checkpoint does not."""
    parts = source_parts(checkpoint)
    packed_head = any(HEAD_MODULE in part.packed for part in parts)
    names = [name for name in checkpoint.family.not_converted if not (packed_head and name == HEAD_MODULE)]
    for part in parts:
        if part.layer is not None:
            others = (f"layers.{part.layer}.{name}" for name in checkpoint.shape.layouts[part.layer].packed())
            names += [name for name in others if f"model.{name}" not in part.packed]
    return names


def stored_dtype(checkpoint: Checkpoint) -> str:
    """Return the dtype of the weights that are not packed, as config.json names it.

    It is the embedding's own: some writers declare another than they store.
    """
    return str(checkpoint.tensors[checkpoint.key(EMBEDDING)].dtype).removeprefix("torch.")


def scale_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Return the dtype that holds all scales exactly: float16 if they are stored as such, else float32."""
    found = checkpoint.packed_linears
    names = () if found is None else (name for name in found.expected if "scale" in name.rpartition(".")[2])
    same = all(checkpoint.tensors[name].dtype == torch.float16 for name in names)
    return torch.float16 if same else torch.float32
