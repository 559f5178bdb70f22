"""The last steps of writing an artifact: what is not a layer, the small files, and reading all of it back."""

from pathlib import Path
from typing import Any

from gemma_awq_cli.models.checkpoints.files import CONFIG
from gemma_awq_cli.models.checkpoints.side_files import copy_side_files
from gemma_awq_cli.models.checkpoints.writing import TensorWriter, write_json
from gemma_awq_cli.models.forward.verification import verify_artifact
from gemma_awq_cli.quantize.preparation import Prepared
from gemma_awq_cli.quantize.report import artifact_config


def finish_artifact(prepared: Prepared, writer: TensorWriter, folder: Path) -> dict[str, Any]:
    """Write everything but the layers and the report, and return what reading the artifact back found."""
    _write_unquantized(prepared, writer)
    writer.finish()
    copy_side_files(prepared.side_files, folder)
    write_json(folder / CONFIG, artifact_config(prepared.checkpoint, prepared.plan))
    return verify_artifact(folder)


def _write_unquantized(prepared: Prepared, writer: TensorWriter) -> None:
    """Write the tensors outside the layers: embedding, final norm, an untied head, and the companions."""
    checkpoint, dtype = prepared.checkpoint, prepared.plan.dtype
    for name in (n for n in prepared.stack.shapes if not n.startswith("model.layers.")):
        pieces = (piece.to(dtype) for piece in checkpoint.pieces(name))
        writer.write_pieces(checkpoint.artifact_key(name), pieces)
    for key in checkpoint.companions():
        writer.write_pieces(key, checkpoint.stored_pieces(key))
