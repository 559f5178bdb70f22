"""The ways in which the models of a bench are opened."""

from collections.abc import Mapping
from pathlib import Path

import torch

from gemma_awq_cli.models.checkpoints.adapter import Adapter, open_adapter
from gemma_awq_cli.models.forward.loading import OpenModel, open_model
from gemma_awq_cli.models.forward.precision import Precision

OWN = "own"  # as `gemma-awq run` opens it
GGUF = "gguf"  # a file, through llama.cpp
VLLM = "vllm"  # through vLLM's engine
# a 16-bit checkpoint in another precision, through transformers and, for int8 and nf4, bitsandbytes
PRECISIONS = {
    "fp16": Precision(dtype=torch.float16),
    "int8": Precision(quantization="int8"),
    "nf4": Precision(quantization="nf4"),
}
# The competitors that run the first model's 16-bit original: how it is opened, and the package that this needs.
ORIGINAL_FORMATS: Mapping[str, tuple[str, str | None]] = {
    "bf16": (OWN, None),
    "fp16": ("fp16", None),
    "int8": ("int8", "bitsandbytes"),
    "nf4": ("nf4", "bitsandbytes"),
}


def open_kind(
    kind: str, folder: Path, device: torch.device, head: str | None = None, adapter: str | None = None
) -> OpenModel:
    """Open a checkpoint as OWN, or in one of PRECISIONS.

    head: how the head is held, None for the default; adapter: the folder of one that is merged into the checkpoint.
    """
    return open_model(folder, device, None if kind == OWN else PRECISIONS[kind], head=head, adapter=adapter_in(adapter))


def adapter_in(folder: str | None) -> Adapter | None:
    """The adapter in a folder; None for no folder."""
    return None if folder is None else open_adapter(Path(folder))
