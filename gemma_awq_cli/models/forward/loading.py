"""Opening a model to run: an artifact with its weights left packed, or any supported 16-bit Gemma."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.kernels.head import DEFAULT_HEAD, DENSE_HEAD
from gemma_awq_cli.models.checkpoints.adapter import Adapter
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward.forward_choice import Forward, choose_forward
from gemma_awq_cli.models.forward.loading_dense import SMALLER, Precision, default_dtype, open_dense
from gemma_awq_cli.models.forward.memory import memory_errors, require_memory
from gemma_awq_cli.models.forward.native_session import NativeSession
from gemma_awq_cli.models.forward.native_weights import NativeText
from gemma_awq_cli.models.forward.session import Session
from gemma_awq_cli.models.forward.torch_decoder import DecoderSession
from gemma_awq_cli.models.forward.transformers_model import build_model
from gemma_awq_cli.models.forward.transformers_session import TransformersSession
from gemma_awq_cli.models.gemma.architecture import PER_LAYER_TABLE
from gemma_awq_cli.models.text.prompter import Prompter, begin_loading
from gemma_awq_cli.system.devices import require_device_name


@dataclass(frozen=True)
class OpenModel:
    """A model that is ready to run. quantized: whether it is an artifact; build: makes `model`."""

    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    quantized: bool
    forward: Forward
    build: Callable[[], Any]
    loading: Future[Prompter]

    @cached_property
    def model(self) -> Any:
        """transformers' causal model of the language model, ready on `device`; built on first use."""
        return self.build()

    @cached_property
    def prompter(self) -> Prompter:
        """The tokenizer and chat template, which load in a thread of their own while the weights are packed."""
        prompter = self.loading.result()
        prompter.fit_to(self.checkpoint.vocabulary)
        return prompter

    def session(self, rows: int, capacity: int) -> Session:
        """A new session of `rows` rows, each of at most `capacity` tokens."""
        text = self.forward.text
        if isinstance(text, NativeText):
            return NativeSession(text, rows, capacity)
        if text is not None:
            return DecoderSession(text, rows, capacity)
        return TransformersSession(self.model, rows, capacity, self.device)

    def kernel_report(self) -> list[str]:
        """Which kernel each kind of linear got and why others were refused, line by line."""
        return list(self.forward.report)

    def slow_kernels(self) -> str | None:
        """Why the model runs more slowly than it could, or None."""
        return self.forward.slow


def pick_device(asked: str) -> torch.device:
    """The device that `auto`, `cpu`, `cuda`, `cuda:N` or `mps` names.

    Raises UsageError for another name, and GemmaAwqError if the device is not there.
    """
    require_device_name(asked)
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if asked.startswith("cuda"):
        if not torch.cuda.is_available():
            raise GemmaAwqError(
                "This PyTorch sees no CUDA device.", "Use --device cpu, or install a CUDA build of torch."
            )
        count = torch.cuda.device_count()
        if ":" in asked and int(asked.split(":")[1]) >= count:
            raise GemmaAwqError(
                f"There is no device {asked}: this PyTorch sees {count}.", f"Use cuda:0 to cuda:{count - 1}."
            )
    if asked == "mps" and not torch.backends.mps.is_available():
        raise GemmaAwqError("This PyTorch sees no Apple GPU (mps).", "Use --device cpu.")
    return torch.device(asked)


def other_devices(asked: str, device: torch.device) -> list[torch.device]:
    """The devices that a model may spread to if it does not fit `device`: every other GPU if `asked` is `auto`."""
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
    adapter: Adapter | None = None,
) -> OpenModel:
    """Open a model folder. An artifact's linears stay packed; they are never expanded to 16 bits as a whole.

    precision, others: for a 16-bit checkpoint only, how to open it and further devices for what does not fit `device`.
    head: one of `kernels.head.HEADS`; None: `DEFAULT_HEAD` for an artifact, 16-bit for a 16-bit checkpoint.
    loading: the folder's prompter, if it is being loaded already; adapter: merged into a 16-bit checkpoint.
    Raises GemmaAwqError for a damaged model or too little memory.
    """
    checkpoint = Checkpoint(folder, adapter)
    quantized = checkpoint.quantization is not None
    chosen = precision or Precision()
    if quantized and chosen != Precision():
        raise UsageError(
            f"{folder} is a 4-bit artifact: --dtype, --quantization and --attn are for 16-bit models.",
            "Leave these options out, or name the 16-bit model.",
        )
    dtype = chosen.dtype or default_dtype(checkpoint, device)
    hint = "Close other programs, or use another --device or machine." if quantized else SMALLER
    if quantized or (device.type == "cpu" and chosen.quantization is None):  # `open_dense` checks the other cases
        _require_room(checkpoint, device, dtype, hint)

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
        assert opened.model is not None  # an error in the files shows now
    return opened


def _require_room(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, hint: str) -> None:
    """Raise GemmaAwqError if the language model's weights need more memory than the device has free."""
    left = set(checkpoint.companions())
    if device.type == "cpu" and checkpoint.shape.per_layer is not None:
        left.add(checkpoint.key(PER_LAYER_TABLE))  # it stays in its file
    infos = [info for name, info in checkpoint.tensors.items() if name not in left]
    name = checkpoint.folder.name
    if checkpoint.quantization is not None:
        require_memory(sum(info.nbytes for info in infos), device, name, hint)
    else:
        needed = sum(torch.Size(info.shape).numel() * dtype.itemsize for info in infos)
        require_memory(needed, device, f"{name} in {str(dtype).removeprefix('torch.')}", hint)
