"""Opening a model to run: an artifact with its weights left packed, or any supported 16-bit Gemma."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gemma_awq_cli.awq.pack import PACK, PackedWeight
from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.kernels import make_linear
from gemma_awq_cli.kernels.cpu import CpuInt4Linear
from gemma_awq_cli.kernels.reference import ReferenceLinear
from gemma_awq_cli.models.checkpoint import REDOWNLOAD, Checkpoint, read_tensors, require_finite
from gemma_awq_cli.models.memory import memory_errors, require_memory
from gemma_awq_cli.models.opening_dense import SMALLER, Precision, default_dtype, make_buffers_real, open_dense
from gemma_awq_cli.models.prompting import Prompter
from gemma_awq_cli.models.session import Session, TransformersSession
from gemma_awq_cli.models.stack import meta_model, parameter_shapes


@dataclass(frozen=True)
class OpenModel:
    """model: transformers' causal model of the text side, ready on `device`; quantized: whether it is an artifact."""

    model: Any
    prompter: Prompter
    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    quantized: bool

    def session(self, rows: int, capacity: int) -> Session:
        """A new session of so many rows, each of at most `capacity` tokens."""
        return TransformersSession(self.model, rows, capacity, self.device)

    def kernel_report(self) -> list[str]:
        """Which kernels the packed linears use, and why others were refused."""
        if not self.quantized:
            return [f"no packed linears: PyTorch's own matmul in {str(self.dtype).removeprefix('torch.')}"]
        linears = [m for m in self.model.modules() if isinstance(m, CpuInt4Linear | ReferenceLinear)]
        fast = sum(isinstance(linear, CpuInt4Linear) for linear in linears)
        slow = self.slow_kernels()
        return [f"{fast} of {len(linears)} linears: PyTorch's int4 matmul for CPUs", *([slow] if slow else [])]

    def slow_kernels(self) -> str | None:
        """Which linears had to take the reference kernel, and why; None if none had to."""
        slow = [module for module in self.model.modules() if isinstance(module, ReferenceLinear)]
        if not slow:
            return None
        weights = (PackedWeight(linear.qweight, linear.qzeros, linear.scales) for linear in slow)
        reasons = {CpuInt4Linear.refusal(weight, self.device, self.dtype) for weight in weights}
        why = "; ".join(sorted(f"the int4 matmul was refused: {reason}" for reason in reasons if reason))
        return f"{len(slow)} linears: the slow reference kernel ({why})"


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
    folder: Path, device: torch.device, precision: Precision | None = None, others: Sequence[torch.device] = ()
) -> OpenModel:
    """Open a model folder. An artifact's linears stay packed; nothing is ever expanded to 16 bit as a whole.

    precision, others: for a 16-bit checkpoint only, how to open it and further devices for what does not fit `device`.
    """
    checkpoint = Checkpoint(folder)
    if checkpoint.quantization is None:
        chosen = precision or Precision()
        with memory_errors(f"loading {folder.name}", SMALLER):
            model = open_dense(checkpoint, [device, *others], chosen)
        dtype = chosen.dtype or default_dtype(checkpoint, device)
        return OpenModel(model, Prompter(folder), checkpoint, device, dtype, quantized=False)
    if precision is not None and precision != Precision():
        raise UsageError(
            f"{folder} is a 4-bit artifact: --dtype, --quantization and --attn are for 16-bit models.",
            "Leave them out, or name the 16-bit model.",
        )
    hint = "Close other programs, or use another --device or machine."
    companions = set(checkpoint.companions())
    needed = sum(info.nbytes for name, info in checkpoint.tensors.items() if name not in companions)
    require_memory(needed, device, folder.name, hint)
    with memory_errors(f"loading {folder.name}", hint):
        return _open_artifact(folder, checkpoint, device)


def _open_artifact(folder: Path, checkpoint: Checkpoint, device: torch.device) -> OpenModel:
    dtype = default_dtype(checkpoint, device)
    model = meta_model(checkpoint.text_config)
    _replace_linears(model, checkpoint, device, dtype)
    shapes = parameter_shapes(model, checkpoint.tied_head)
    checkpoint.require_shapes(shapes)
    weights = {name: tensor.to(device, dtype) for name, tensor in checkpoint.read(shapes).items()}
    model.load_state_dict(weights, strict=False, assign=True)
    if checkpoint.tied_head:
        model.lm_head.weight = model.model.embed_tokens.weight
    make_buffers_real(model, device)
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if left:
        raise AssertionError(f"never made real: {left[:3]}")
    model.requires_grad_(False)
    return OpenModel(model, Prompter(folder), checkpoint, device, dtype, quantized=True)


def _replace_linears(model: nn.Module, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
    """Put packed linears where the artifact has them."""
    group_size = require_awq(checkpoint)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.startswith("model.layers."):
            packed = read_packed(checkpoint, name, module.in_features, module.out_features, group_size)
            model.set_submodule(name, make_linear(packed, device, dtype))


def require_awq(checkpoint: Checkpoint) -> int:
    """The group size of an AutoAWQ GEMM artifact; an error for any other kind of quantization."""
    config = checkpoint.quantization or {}
    method, version, bits = config.get("quant_method"), str(config.get("version", "gemm")).lower(), config.get("bits")
    if method != "awq" or version != "gemm" or bits != 4:
        raise GemmaAwqError(
            f"{checkpoint.folder} is quantized as {method} {version} {bits}-bit; only 4-bit AWQ (gemm) is read.",
            "Quantize the original 16-bit checkpoint with `gemma-awq quantize`.",
        )
    group_size = config.get("group_size")
    if not isinstance(group_size, int) or group_size <= 0:
        raise GemmaAwqError(
            f"{checkpoint.folder}: quantization_config has group_size {group_size!r}.", "Quantize the model again."
        )
    return group_size


def read_packed(
    checkpoint: Checkpoint, name: str, in_features: int, out_features: int, group_size: int
) -> PackedWeight:
    """One linear's packed tensors, checked against the shapes that the config implies."""
    base = checkpoint.key(f"{name}.weight").removesuffix(".weight")
    expected = {
        "qweight": (in_features, out_features // PACK),
        "qzeros": (in_features // group_size, out_features // PACK),
        "scales": (in_features // group_size, out_features),
    }
    for kind in PackedWeight._fields:
        info = checkpoint.tensors.get(f"{base}.{kind}")
        if info is None:
            raise GemmaAwqError(f"{checkpoint.folder} lacks the tensor {base}.{kind}.", REDOWNLOAD)
        if info.shape != expected[kind]:
            raise GemmaAwqError(
                f"{base}.{kind} has shape {list(info.shape)}, but config.json asks for {list(expected[kind])}.",
                "The config and the weights are of different models. " + REDOWNLOAD,
            )
    tensors = read_tensors(checkpoint.tensors, [f"{base}.{kind}" for kind in PackedWeight._fields])
    require_finite(f"{base}.scales", tensors[f"{base}.scales"])
    return PackedWeight(*(tensors[f"{base}.{kind}"] for kind in PackedWeight._fields))
