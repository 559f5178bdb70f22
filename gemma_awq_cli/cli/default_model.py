"""The model that a command takes if none is given."""

import os
from pathlib import Path

from gemma_awq_cli.cli.console import Output
from gemma_awq_cli.errors import GemmaAwqError, UsageError

MODEL_VARIABLE = "GEMMA_AWQ_MODEL"


def default_model(out: Output) -> str:
    """Return the model that `GEMMA_AWQ_MODEL` names, else the last artifact that quantize wrote. Notes which it is."""
    configured = os.environ.get(MODEL_VARIABLE)
    if configured == "":
        raise UsageError(f"{MODEL_VARIABLE} is set but empty.", "Unset it, or set it to a model.")
    if configured:
        out.note(f"Model: {configured} (from {MODEL_VARIABLE})")
        return configured
    return str(last_artifact_folder(out, "model"))


def last_artifact_folder(out: Output, what: str) -> Path:
    """Return the folder of the last artifact that quantize wrote, and note it. what: what the user could have named."""
    from gemma_awq_cli.models.checkpoints.cache import last_artifact

    last = last_artifact()
    if last is None:
        raise GemmaAwqError(
            f"No {what} is given and none was quantized yet.", f"Run `gemma-awq quantize`, or name the {what}."
        )
    if not last.is_dir():
        raise GemmaAwqError(
            f"The last artifact, {last}, is gone.", f"Run `gemma-awq quantize` again, or name the {what}."
        )
    out.note(f"{what.capitalize()}: {_short(last)} (the last artifact)")
    return last


def _short(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
