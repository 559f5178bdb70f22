"""What an export must say of its source: which linears are not packed, and the dtypes that hold the rest exactly."""

import torch

from gemma_awq_cli.export.source_parts import source_parts
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.expected_tensors import EMBEDDING

_SCALES = (".scales", ".weight_scale")


def not_packed(checkpoint: Checkpoint) -> list[str]:
    """Return the linears that an artifact of this tool packs and this checkpoint does not: `layers.3.mlp.up_proj`."""
    found = []
    for part in source_parts(checkpoint):
        if part.layer is not None:
            names = (f"layers.{part.layer}.{name}" for name in checkpoint.shape.layouts[part.layer].packed())
            found += [name for name in names if f"model.{name}" not in part.packed]
    return found


def stored_dtype(checkpoint: Checkpoint) -> str:
    """Return the dtype of the weights that are not packed, as config.json names it.

    It is the embedding's own: some writers declare another than they store.
    """
    return str(checkpoint.tensors[checkpoint.key(EMBEDDING)].dtype).removeprefix("torch.")


def scale_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Return the dtype that holds all scales exactly: float16 if they are stored as such, else float32."""
    stored = (info.dtype for name, info in checkpoint.tensors.items() if name.endswith(_SCALES))
    return torch.float16 if all(dtype == torch.float16 for dtype in stored) else torch.float32
