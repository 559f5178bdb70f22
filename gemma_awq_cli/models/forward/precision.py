"""How a model is opened: its dtype, quantization on loading and attention. Without torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch

SMALLER = "Use --quantization nf4 or int8, a 4-bit artifact of it (`gemma-awq quantize`), or another --device."
DEFAULT_DTYPE = "bfloat16"


@dataclass(frozen=True)
class Precision:
    """How to open a 16-bit checkpoint; None: what suits the device and the model.

    dtype: torch's, or its name; quantization: `int8` or `nf4`, which bitsandbytes applies to the layers' linears on
    loading; attention: the name that transformers has for an implementation.
    """

    dtype: "torch.dtype | str | None" = None
    quantization: str | None = None
    attention: str | None = None

    def dtype_name(self, checkpoint: Checkpoint, device: str) -> str:
        """torch's name of the dtype, or of the default one on a device such as `cuda:0`."""
        if self.dtype is not None:
            return str(self.dtype).removeprefix("torch.")
        return default_dtype_name(checkpoint, device)


def default_dtype_name(checkpoint: Checkpoint, device: str) -> str:
    """bfloat16; or float16 for a float16 checkpoint on CUDA, if the family's activations fit float16."""
    # float16 arithmetic is slow on CPUs and overflows in Gemma 2 and 3
    if device.startswith("cuda") and checkpoint.family.float16 and checkpoint.dtype_name == "float16":
        return "float16"
    return DEFAULT_DTYPE
