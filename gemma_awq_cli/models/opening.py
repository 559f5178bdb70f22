"""Opening a model to run: an artifact with its weights left packed, or any supported 16-bit Gemma."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gemma_awq_cli.awq.pack import PACK, PackedWeight
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.kernels import make_linear
from gemma_awq_cli.models.checkpoint import REDOWNLOAD, Checkpoint, read_tensors, require_finite
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
def open_model(folder: Path, device: torch.device) -> OpenModel:
    """Open a model folder. An artifact's linears stay packed; nothing is ever expanded to 16 bit as a whole."""
    checkpoint = Checkpoint(folder)
    # float16 arithmetic is slow on CPUs and overflows in Gemma 2 and 3
    dtype = checkpoint.declared_dtype if device.type == "cuda" and checkpoint.family.float16 else torch.bfloat16
    if dtype not in (torch.float16, torch.bfloat16):
        dtype = torch.bfloat16
    model = meta_model(checkpoint.text_config)
    quantized = checkpoint.quantization is not None
    if quantized:
        _replace_linears(model, checkpoint, device, dtype)
    shapes = parameter_shapes(model, checkpoint.tied_head)
    checkpoint.require_shapes(shapes)
    weights = {name: tensor.to(device, dtype) for name, tensor in checkpoint.read(shapes).items()}
    model.load_state_dict(weights, strict=False, assign=True)
    if checkpoint.tied_head:
        model.lm_head.weight = model.model.embed_tokens.weight
    _make_buffers_real(model, device, dtype)
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if left:
        raise AssertionError(f"never made real: {left[:3]}")
    model.requires_grad_(False)
    return OpenModel(model, Prompter(folder), checkpoint, device, dtype, quantized)


def _make_buffers_real(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Rotary tables and the embedding's scale are computed from the config, not stored."""
    text = model.model
    with torch.device(device):
        text.rotary_emb = type(text.rotary_emb)(text.config)
    text.embed_tokens.embed_scale = torch.tensor(text.embed_tokens.scalar_embed_scale, device=device)


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
