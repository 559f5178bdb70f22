"""The last steps of writing an artifact: what is not a layer, the small files, and reading all of it back."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gemma_awq_cli.models.checkpoints.files import CONFIG
from gemma_awq_cli.models.checkpoints.side_files import copy_side_files
from gemma_awq_cli.models.checkpoints.writing import TensorWriter, write_json
from gemma_awq_cli.models.forward.verification import verify_artifact
from gemma_awq_cli.quantize.preparation import Prepared
from gemma_awq_cli.quantize.report import artifact_config


def finish_artifact(prepared: Prepared, writer: TensorWriter, folder: Path) -> dict[str, Any]:
    """Write everything but the layers and the report, and return what reading the artifact back found."""
    for key, pieces in unquantized(prepared):
        writer.write_pieces(key, pieces)
    writer.finish()
    copy_side_files(prepared.side_files, folder)
    write_json(folder / CONFIG, artifact_config(prepared.checkpoint, prepared.plan))
    return verify_artifact(folder)


def unquantized(prepared: Prepared) -> Iterator[tuple[str, Iterator[torch.Tensor]]]:
    """Yield the tensors outside the layers by their keys, in pieces: embedding, final norm, untied head, companions."""
    checkpoint, dtype = prepared.checkpoint, prepared.plan.dtype
    for name in (n for n in prepared.stack.shapes if not n.startswith("model.layers.")):
        yield checkpoint.artifact_key(name), (piece.to(dtype) for piece in checkpoint.pieces(name))
    for key in checkpoint.companions():
        yield key, checkpoint.stored_pieces(key)
