"""Opening a model to run: an artifact with its weights left packed, or any supported 16-bit Gemma.

Which forward runs it is decided here, best first: the compiled decoder, the torch decoder, transformers' own modules.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from gemma_awq_cli import kernels
from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.kernels.head import DEFAULT_HEAD, DENSE_HEAD, head_group
from gemma_awq_cli.kernels.native import library as native_library
from gemma_awq_cli.models.checkpoints.cache import cache_folder
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.expected_tensors import linear_shapes
from gemma_awq_cli.models.checkpoints.packed_linears import read_packed, require_awq
from gemma_awq_cli.models.forward.loading_dense import SMALLER, Precision, default_dtype, open_dense
from gemma_awq_cli.models.forward.memory import memory_errors, require_memory
from gemma_awq_cli.models.forward.native_decoder import (
    NativeSession,
    NativeText,
    native_refusal,
    native_report,
    read_native_text,
)
from gemma_awq_cli.models.forward.session import Session, TransformersSession
from gemma_awq_cli.models.forward.torch_decoder import DecoderSession, TextWeights
from gemma_awq_cli.models.forward.torch_weights import read_torch_text
from gemma_awq_cli.models.forward.transformers_model import build_model
from gemma_awq_cli.models.gemma import architecture
from gemma_awq_cli.models.text.prompter import Prompter, begin_loading


@dataclass(frozen=True)
class Forward:
    """What runs the model. text: None where transformers' own modules do.

    report: how it was chosen, a line each; slow: what a user should know of a slower choice, or None.
    """

    text: NativeText | TextWeights | None
    report: tuple[str, ...]
    slow: str | None = None
    head: str = DENSE_HEAD  # how the head is held, one of `kernels.head.HEADS`


@dataclass(frozen=True)
class OpenModel:
    """quantized: whether it is an artifact."""

    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    quantized: bool
    forward: Forward
    build: Callable[[], Any]
    loading: Future[Prompter]

    @cached_property
    def model(self) -> Any:
        """transformers' causal model of the text side, ready on `device`; built when it is first asked for."""
        return self.build()

    @cached_property
    def prompter(self) -> Prompter:
        """The tokenizer, which loads on a thread of its own while the weights are packed."""
        prompter = self.loading.result()
        prompter.fit_to(self.checkpoint.vocabulary)
        return prompter

    def session(self, rows: int, capacity: int) -> Session:
        """A new session of so many rows, each of at most `capacity` tokens."""
        text = self.forward.text
        if isinstance(text, NativeText):
            return NativeSession(text, rows, capacity)
        if text is not None:
            return DecoderSession(text, rows, capacity)
        return TransformersSession(self.model, rows, capacity, self.device)

    def kernel_report(self) -> list[str]:
        """Which kernel each kind of linear got and why others were refused, a line each."""
        return list(self.forward.report)

    def slow_kernels(self) -> str | None:
        """Why the model runs more slowly than it could, or None."""
        return self.forward.slow


def pick_device(asked: str) -> torch.device:
    """`auto`, `cpu`, `cuda`, `cuda:N` or `mps` -> a device that is there."""
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if asked.startswith("cuda"):
        if not torch.cuda.is_available():
            raise GemmaAwqError(
                "This PyTorch sees no CUDA device.", "Use --device cpu, or install a CUDA build of torch."
            )
        count = torch.cuda.device_count()
        if ":" in asked and int(asked.split(":")[1]) >= count:
            raise GemmaAwqError(f"There is no {asked}: this PyTorch sees {count}.", f"Use cuda:0 to cuda:{count - 1}.")
    if asked == "mps" and not torch.backends.mps.is_available():
        raise GemmaAwqError("This PyTorch sees no Apple GPU (mps).", "Use --device cpu.")
    return torch.device(asked)


def other_devices(asked: str, device: torch.device) -> list[torch.device]:
    """What a model that does not fit `device` may spread to: every other GPU, if the choice was left open."""
    if asked != "auto" or device.type != "cuda":
        return []
    return [torch.device("cuda", index) for index in range(1, torch.cuda.device_count())]


@torch.inference_mode()
def open_model(
    folder: Path,
    device: torch.device,
    precision: Precision | None = None,
    others: Sequence[torch.device] = (),
    head: str | None = None,
    loading: Future[Prompter] | None = None,
) -> OpenModel:
    """Open a model folder. An artifact's linears stay packed; nothing is ever expanded to 16 bit as a whole.

    precision, others: for a 16-bit checkpoint only, how to open it and further devices for what does not fit `device`.
    head: one of `kernels.head.HEADS`; None: `DEFAULT_HEAD` for an artifact, 16-bit for a 16-bit checkpoint.
    loading: the folder's prompter, if it is being loaded already.
    """
    checkpoint = Checkpoint(folder)
    quantized = checkpoint.quantization is not None
    chosen = precision or Precision()
    if quantized and chosen != Precision():
        raise UsageError(
            f"{folder} is a 4-bit artifact: --dtype, --quantization and --attn are for 16-bit models.",
            "Leave them out, or name the 16-bit model.",
        )
    dtype = chosen.dtype or default_dtype(checkpoint, device)
    hint = "Close other programs, or use another --device or machine." if quantized else SMALLER
    if quantized or (device.type == "cpu" and chosen.quantization is None):  # elsewhere `open_dense` asks
        companions = set(checkpoint.companions())
        infos = [info for name, info in checkpoint.tensors.items() if name not in companions]
        needed = sum(i.nbytes if quantized else torch.Size(i.shape).numel() * dtype.itemsize for i in infos)
        name = folder.name if quantized else f"{folder.name} in {str(dtype).removeprefix('torch.')}"
        require_memory(needed, device, name, hint)

    def build() -> Any:
        with memory_errors(f"loading {folder.name}", hint):
            if quantized:
                return build_model(checkpoint, device, dtype)
            return open_dense(checkpoint, [device, *others], chosen)

    prompter = loading or begin_loading(folder)
    with memory_errors(f"loading {folder.name}", hint):
        forward = choose_forward(checkpoint, device, dtype, chosen, head or (DEFAULT_HEAD if quantized else DENSE_HEAD))
    opened = OpenModel(checkpoint, device, dtype, quantized, forward, build, prompter)
    if forward.text is None:
        assert opened.model is not None  # what is wrong with the files shows now
    return opened


def choose_forward(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, precision: Precision, head: str
) -> Forward:
    """The fastest forward that can run this model as it was asked for."""
    group_size = require_awq(checkpoint) if checkpoint.quantization is not None else None
    unknown = architecture.refusal(checkpoint.facts)
    if device.type != "cpu":
        unknown = unknown or f"the decode paths of our own run on the CPU, and this is {device.type}"
    if precision.quantization or precision.attention:
        unknown = unknown or "they know --quantization and --attn"
    if unknown:
        report, slow = linear_report(checkpoint, group_size, device, dtype)
        return Forward(None, (f"forward: transformers' modules ({unknown})", *report), slow)
    arch = architecture.architecture_of(checkpoint.facts, checkpoint.family)
    if head != DENSE_HEAD and head_group(head, arch.hidden) is None:
        head = DENSE_HEAD
    library = f"it computes in bfloat16 and float32, not {dtype}" if dtype != torch.bfloat16 else None
    library = library or native_refusal(checkpoint, arch, group_size)
    loaded = library or native_library.load(cache_folder() / "native")
    if not isinstance(loaded, str):
        text = read_native_text(loaded, checkpoint, arch, group_size, head)
        return Forward(text, tuple(native_report(text)), head=head)
    report, slow = linear_report(checkpoint, group_size, device, dtype)
    decoder = read_torch_text(checkpoint, arch, group_size, device, dtype, head)
    if dtype == torch.bfloat16 and group_size is not None:
        slow = f"the compiled forward, several times as fast, is not used: {loaded}" + (f"; {slow}" if slow else "")
    return Forward(decoder, (f"forward: torch (not the compiled one: {loaded})", *report), slow, head)


def linear_report(
    checkpoint: Checkpoint, group_size: int | None, device: torch.device, dtype: torch.dtype
) -> tuple[list[str], str | None]:
    """Which torch kernel each kind of linear of the first layer gets and why faster ones were refused; what is slow."""
    if group_size is None:
        return [f"linears: PyTorch's own products in {str(dtype).removeprefix('torch.')}"], None
    lines, slow = [], None
    for name, packed in _first_layer(checkpoint, group_size):
        kernel, refused = kernels.choose(packed, device, dtype)
        lines.append(f"{name}: {kernels.describe(packed, device, dtype)}")
        if kernel is kernels.KERNELS[-1]:
            slow = f"the slow reference kernel ({'; '.join(refused)})"
    return lines, slow


def _first_layer(checkpoint: Checkpoint, group_size: int) -> Iterator[tuple[str, Any]]:
    shapes = linear_shapes(architecture.shape_of(checkpoint.facts, checkpoint.family))
    for name, (outputs, inputs) in shapes.items():
        yield name.rpartition(".")[2], read_packed(checkpoint, f"model.layers.0.{name}", inputs, outputs, group_size)
