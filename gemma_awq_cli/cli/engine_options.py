"""The options that say how `run` runs a model: device, dtype, quantization, engine."""

import re
from dataclasses import dataclass

from gemma_awq_cli.cli.options import Attention, ComputeDtype, EngineName, Head, Quantization
from gemma_awq_cli.errors import UsageError

DEVICES = re.compile(r"auto|cpu|cuda(:\d+)?|mps")


@dataclass(frozen=True)
class EngineOptions:
    """The options that say how the model is run, as they were given."""

    device: str
    dtype: ComputeDtype | None
    quantization: Quantization | None
    attn: Attention | None
    head: Head | None
    engine: EngineName
    tensor_parallel: int
    pipeline_parallel: int
    verbose: bool

    def require_consistent(self) -> None:
        """A usage error for options that exclude each other."""
        if not DEVICES.fullmatch(self.device):
            raise UsageError(f"--device {self.device!r} is no device.", "Give auto, cpu, cuda, cuda:0 or mps.")
        if self.engine is EngineName.vllm:
            given = {
                "--quantization": self.quantization, "--attn": self.attn, "--head": self.head,
                "--verbose": self.verbose or None, "--device": None if self.device == "auto" else self.device,
            }  # fmt: skip
            if wrong := [option for option, value in given.items() if value is not None]:
                raise UsageError(f"{wrong[0]} is not for --engine vllm, which decides that itself.", "Leave it out.")
        elif self.tensor_parallel * self.pipeline_parallel > 1:
            raise UsageError("--tensor-parallel and --pipeline-parallel are vLLM's.", "Add --engine vllm.")
