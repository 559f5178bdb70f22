"""Opening a model to run: an artifact with its weights left packed, or any supported 16-bit Gemma.

Which forward runs it is decided here, best first: the compiled decoder, the torch decoder, transformers' own modules.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from gemma_awq_cli import kernels
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.kernels.head import DEFAULT_HEAD, DENSE_HEAD
from gemma_awq_cli.kernels.native import library as native_library
from gemma_awq_cli.models import architecture
from gemma_awq_cli.models.cache import cache_folder
from gemma_awq_cli.models.checkpoint import Checkpoint
from gemma_awq_cli.models.decoder import DecoderSession, TextWeights
from gemma_awq_cli.models.native_text import NativeSession, NativeText, native_refusal, native_report, read_native_text
from gemma_awq_cli.models.packed_reading import read_packed, require_awq
from gemma_awq_cli.models.prompting import Prompter
from gemma_awq_cli.models.session import Session, TransformersSession
from gemma_awq_cli.models.text_weights import linear_shapes, require_text_shapes
from gemma_awq_cli.models.torch_text import read_torch_text
from gemma_awq_cli.models.transformers_model import build_model


@dataclass(frozen=True)
class OpenModel:
    """text: the weights of the forward that runs it, None where that is transformers'; report: how it was chosen."""

    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    quantized: bool
    text: NativeText | TextWeights | None
    report: tuple[str, ...]
    loading: Future[Prompter]

    @cached_property
    def model(self) -> Any:
        """transformers' causal model of the text side, ready on `device`; built when it is first asked for."""
        return build_model(self.checkpoint, self.device, self.dtype)

    @cached_property
    def prompter(self) -> Prompter:
        """The tokenizer, which loads on a thread of its own while the weights are packed."""
        return self.loading.result()

    def session(self, rows: int, capacity: int) -> Session:
        """A new session of so many rows, each of at most `capacity` tokens."""
        if isinstance(self.text, NativeText):
            return NativeSession(self.text, rows, capacity)
        if self.text is not None:
            return DecoderSession(self.text, rows, capacity)
        return TransformersSession(self.model, rows, capacity, self.device)

    def kernel_report(self) -> list[str]:
        """Which kernel each kind of linear got and why others were refused, a line each."""
        return list(self.report)


def pick_device(asked: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `mps` -> a device that is there."""
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if asked == "cuda" and not torch.cuda.is_available():
        raise GemmaAwqError("This PyTorch sees no CUDA device.", "Use --device cpu, or install a CUDA build of torch.")
    if asked == "mps" and not torch.backends.mps.is_available():
        raise GemmaAwqError("This PyTorch sees no Apple GPU (mps).", "Use --device cpu.")
    return torch.device(asked)


@torch.inference_mode()
def open_model(folder: Path, device: torch.device, head: str | None = None) -> OpenModel:
    """Open a model folder. An artifact's linears stay packed; nothing is ever expanded to 16 bit as a whole.

    head: one of `kernels.head.HEADS`; None: `DEFAULT_HEAD` for an artifact, 16-bit for a 16-bit checkpoint.
    """
    checkpoint = Checkpoint(folder)
    loader = ThreadPoolExecutor(1)
    prompter = loader.submit(Prompter, folder)
    loader.shutdown(wait=False)
    # float16 arithmetic is slow on CPUs and overflows in Gemma 2 and 3
    dtype = checkpoint.declared_dtype if device.type == "cuda" and checkpoint.family.float16 else torch.bfloat16
    if dtype not in (torch.float16, torch.bfloat16):
        dtype = torch.bfloat16
    quantized = checkpoint.quantization is not None
    group_size = require_awq(checkpoint) if quantized else None
    head = head or (DEFAULT_HEAD if quantized else DENSE_HEAD)
    unknown = architecture.refusal(checkpoint.text_config)
    if device.type != "cpu":
        unknown = unknown or f"the decode paths of our own run on the CPU, and this is {device.type}"
    if unknown:
        report = [f"forward: transformers' modules ({unknown})", *linear_report(checkpoint, group_size, device, dtype)]
        opened = OpenModel(checkpoint, device, dtype, quantized, None, tuple(report), prompter)
        assert opened.model is not None  # an error in the files shows here
        return opened
    arch = architecture.architecture_of(checkpoint.text_config, checkpoint.family)
    require_text_shapes(checkpoint, arch)
    library = native_refusal(checkpoint, arch, group_size) or native_library.load(cache_folder() / "native")
    if isinstance(library, str):
        report = [
            f"forward: torch (not the compiled one: {library})",
            *linear_report(checkpoint, group_size, device, dtype),
        ]
        text: NativeText | TextWeights = read_torch_text(checkpoint, arch, group_size, device, dtype, head)
    else:
        text = read_native_text(library, checkpoint, arch, group_size, head)
        report = native_report(text)
    return OpenModel(checkpoint, device, dtype, quantized, text, tuple(report), prompter)


def linear_report(
    checkpoint: Checkpoint, group_size: int | None, device: torch.device, dtype: torch.dtype
) -> Iterator[str]:
    """Which torch kernel each kind of linear of the first layer gets, and why faster ones were refused."""
    if group_size is None:
        yield f"linears: {dtype} products of PyTorch"
        return
    shapes = linear_shapes(architecture.architecture_of(checkpoint.text_config, checkpoint.family))
    for name, (outputs, inputs) in shapes.items():
        packed = read_packed(checkpoint, f"model.layers.0.{name}", inputs, outputs, group_size)
        yield f"{name.rpartition('.')[2]}: {kernels.describe(packed, device, dtype)}"
