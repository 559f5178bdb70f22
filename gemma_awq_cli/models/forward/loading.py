"""Opening a model to run: an artifact with its weights left packed, or any supported 16-bit Gemma."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_awq_cli.errors import UsageError
from gemma_awq_cli.kernels.head_kinds import DEFAULT_HEAD, DENSE_HEAD
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward.devices import CPU
from gemma_awq_cli.models.forward.forward_choice import Forward, choose_forward
from gemma_awq_cli.models.forward.kv_kinds import KV_16BIT, KV_INT8
from gemma_awq_cli.models.forward.memory import free_memory, memory_errors, require_memory
from gemma_awq_cli.models.forward.native_session import NativeSession
from gemma_awq_cli.models.forward.native_weights import NativeText
from gemma_awq_cli.models.forward.precision import SMALLER, Precision
from gemma_awq_cli.models.forward.session import Session
from gemma_awq_cli.models.gemma.architecture import PER_LAYER_TABLE
from gemma_awq_cli.models.text.prompter import Prompter, begin_loading
from gemma_awq_cli.system.arrays import DTYPES

if TYPE_CHECKING:
    import torch

    from gemma_awq_cli.models.checkpoints.adapter import Adapter


@dataclass(frozen=True)
class OpenModel:
    """A model that is ready to run.

    device_name, dtype_name: torch's; quantized: whether it is an artifact; build: makes `model` of this; kv_cache: one
    of `KV_CACHES`, how sessions hold keys and values. Nothing that it holds refers to it, so that its memory is free as
    soon as its last user lets it go.
    """

    checkpoint: Checkpoint
    device_name: str
    dtype_name: str
    quantized: bool
    forward: Forward
    build: Callable[["OpenModel"], Any]
    loading: Future[Prompter]
    kv_cache: str = KV_16BIT

    @property
    def device(self) -> "torch.device":
        """Where it runs."""
        import torch

        return torch.device(self.device_name)

    @property
    def dtype(self) -> "torch.dtype":
        """What activations are held in."""
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype_name)
        return dtype

    @cached_property
    def model(self) -> Any:
        """transformers' causal model of the language model, ready on `device`; built on first use."""
        return self.build(self)

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
            return NativeSession(text, rows, capacity, self.kv_cache)
        if self.device_name != CPU and text is not None:
            from gemma_awq_cli.models.forward.device_session import DeviceSession, DeviceText

            assert isinstance(text, DeviceText)
            return DeviceSession(text, rows, capacity)
        if text is not None:
            from gemma_awq_cli.models.forward.torch_decoder import DecoderSession
            from gemma_awq_cli.models.forward.torch_layers import TextWeights

            assert isinstance(text, TextWeights)
            return DecoderSession(text, rows, capacity)
        from gemma_awq_cli.models.forward.transformers_session import TransformersSession

        return TransformersSession(self.model, rows, capacity, self.device)

    def kernel_report(self) -> list[str]:
        """Which kernel each kind of linear got and why others were refused, line by line."""
        return list(self.forward.report)

    def slow_kernels(self) -> str | None:
        """Why the model runs more slowly than it could, or None."""
        return self.forward.slow


def open_model(
    folder: Path,
    device: "torch.device | str",
    precision: Precision | None = None,
    others: "Sequence[torch.device]" = (),
    head: str | None = None,
    loading: Future[Prompter] | None = None,
    adapter: "Adapter | None" = None,
    kv_cache: str = KV_16BIT,
) -> OpenModel:
    """Open a model folder. An artifact's linears stay packed; they are never expanded to 16 bits as a whole.

    device: torch's, or its name. precision, others: for a 16-bit checkpoint only, how to open it and further devices
    for what does not fit `device`.
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
    place = str(device)
    dtype = chosen.dtype_name(checkpoint, place)
    hint = "Close other programs, or use another --device or machine." if quantized else SMALLER
    refusal = None
    needed = _least_memory(checkpoint, dtype)
    if others and not quantized and needed * 1.1 > (free_memory(place) or needed * 2):
        refusal = "only they spread a model over several GPUs"
    if quantized or (refusal is None and chosen.quantization is None):  # `open_dense` checks the other cases
        name = checkpoint.folder.name
        require_memory(needed, place, name if quantized else f"{name} in {dtype}", hint)

    def build(opened: OpenModel) -> Any:
        with memory_errors(f"loading {folder.name}", hint):
            return _transformers_model(opened, others, chosen)

    prompter = loading or begin_loading(folder)
    with memory_errors(f"loading {folder.name}", hint):
        head = head or (DEFAULT_HEAD if quantized else DENSE_HEAD)
        forward = choose_forward(checkpoint, place, dtype, chosen, head, refusal)
    _require_kv_cache(kv_cache, quantized, forward)
    opened = OpenModel(checkpoint, place, dtype, quantized, forward, build, prompter, kv_cache)
    if forward.text is None:
        assert opened.model is not None  # an error in the files shows now
    return opened


def _require_kv_cache(kv_cache: str, quantized: bool, forward: Forward) -> None:
    """Raise UsageError for keys and values in 8 bits of a model that torch reads, on some processors at least."""
    if kv_cache == KV_INT8 and not (quantized and isinstance(forward.text, NativeText)):
        raise UsageError(
            "--kv-cache int8 is for artifacts that run on the compiled CPU kernels.",
            "Leave it out; --verbose says what runs this model.",
        )


def _transformers_model(opened: OpenModel, others: "Sequence[torch.device]", precision: Precision) -> Any:
    """transformers' causal model with the weights of the checkpoint."""
    if opened.quantized:
        from gemma_awq_cli.models.forward.transformers_model import build_model

        return build_model(opened.checkpoint, opened.device, opened.dtype)
    from gemma_awq_cli.models.forward.loading_dense import open_dense

    return open_dense(opened.checkpoint, [opened.device, *others], precision)


def _least_memory(checkpoint: Checkpoint, dtype: str) -> int:
    """Bytes of the language model's weights, without a per-layer table, which stays in its file."""
    left = set(checkpoint.companions())
    if checkpoint.shape.per_layer is not None:
        left.add(checkpoint.key(PER_LAYER_TABLE))
    infos = [info for name, info in checkpoint.tensors.items() if name not in left]
    if checkpoint.quantization is not None:
        return sum(info.nbytes for info in infos)
    return sum(prod(info.shape) * DTYPES[dtype].itemsize for info in infos)
