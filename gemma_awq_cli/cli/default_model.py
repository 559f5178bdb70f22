"""The model that a command takes when none is named."""

import os
from pathlib import Path

from gemma_awq_cli.cli.console import Output
from gemma_awq_cli.errors import GemmaAwqError, UsageError

MODEL_VARIABLE = "GEMMA_AWQ_MODEL"


def default_model(out: Output) -> str:
    """`GEMMA_AWQ_MODEL`, else the last artifact that quantize wrote; says which."""
    configured = os.environ.get(MODEL_VARIABLE)
    if configured == "":
        raise UsageError(f"{MODEL_VARIABLE} is set, and empty.", "Unset it, or give it a model.")
    if configured:
        out.note(f"Model: {configured} (from {MODEL_VARIABLE})")
        return configured
    from gemma_awq_cli.models.checkpoints.cache import last_artifact

    last = last_artifact()
    if last is None:
        raise GemmaAwqError(
            "No model is named and none was quantized yet.", "Run `gemma-awq quantize`, or name one with -m."
        )
    if not last.is_dir():
        raise GemmaAwqError(
            f"The last artifact, {last}, is gone.", "Run `gemma-awq quantize` again, or name a model with -m."
        )
    out.note(f"Model: {_short(last)} (the last artifact)")
    return str(last)


def _short(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
