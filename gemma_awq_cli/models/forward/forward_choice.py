"""Which forward runs a model, best first: the compiled decoder, the torch decoder, transformers' own modules.

The compiled one runs on the CPU; on a GPU the torch decoder runs in recorded steps (`device_session`).

Each declares the features that it implements; a model that needs more goes to the next one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gemma_awq_cli.kernels.head_kinds import DENSE_HEAD, head_group
from gemma_awq_cli.kernels.native import library as native_library
from gemma_awq_cli.kernels.native.library import Library, Unavailable
from gemma_awq_cli.models.checkpoints.cache import cache_folder
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward import native_weights
from gemma_awq_cli.models.forward.devices import CPU
from gemma_awq_cli.models.forward.native_weights import NativeText, native_refusal, native_report, read_native_text
from gemma_awq_cli.models.forward.precision import DEFAULT_DTYPE, Precision
from gemma_awq_cli.models.gemma.architecture import Architecture, architecture_of
from gemma_awq_cli.models.gemma.features import features_of, missing_features

if TYPE_CHECKING:
    from gemma_awq_cli.awq.packing import PackedWeight
    from gemma_awq_cli.models.forward.device_session import DeviceText
    from gemma_awq_cli.models.forward.torch_layers import TextWeights


@dataclass(frozen=True)
class Forward:
    """What runs the model. text: the weights of a decoder of our own; None: transformers' modules run it.

    report: how it was chosen, line by line; slow: why it is slower than it could be, or None; head: how the head is
    held, one of `kernels.head.HEADS`; head_reason: why that is not what was asked for.
    """

    text: "NativeText | TextWeights | DeviceText | None"
    report: tuple[str, ...]
    slow: str | None = None
    head: str = DENSE_HEAD
    head_reason: str = ""


def choose_forward(
    checkpoint: Checkpoint, device: str, dtype: str, precision: Precision, head: str, refusal: str | None = None
) -> Forward:
    """The fastest forward that can run this model as it was asked for, with its weights read.

    device, dtype: torch's names. refusal: why it must be transformers' modules, if it must. torch is imported only if
    the compiled decoder cannot run it.
    """
    is_packed = checkpoint.packed_linears is not None
    needed = features_of(checkpoint.facts, checkpoint.family)
    if refusal := refusal or _decoders_refusal(precision, needed):
        report, slow = linear_report(checkpoint, device, dtype)
        reason = f"transformers' modules run this model ({refusal})"
        return Forward(None, (f"forward: transformers' modules ({refusal})", *report), slow, head_reason=reason)
    arch = architecture_of(checkpoint.facts, checkpoint.family)
    reason = ""
    if head != DENSE_HEAD and head_group(head, arch.hidden) is None:
        head, reason = DENSE_HEAD, f"no group size divides its {arch.hidden} inputs"
    if device != CPU:
        return _on_device(checkpoint, arch, device, dtype, head, reason)
    library = _native_library(checkpoint, arch, dtype, needed)
    if isinstance(library, Library):
        text = read_native_text(library, checkpoint, arch, head)
        return Forward(text, tuple(native_report(text)), head=head, head_reason=reason)
    report, slow = linear_report(checkpoint, device, dtype)
    decoder = _torch_text(checkpoint, arch, device, dtype, head)
    if dtype == DEFAULT_DTYPE and is_packed:
        slow = f"the compiled forward, several times as fast, is not used: {library}" + (f"; {slow}" if slow else "")
    return Forward(decoder, (f"forward: torch (not the compiled one: {library})", *report), slow, head, reason)


def _on_device(
    checkpoint: Checkpoint, arch: Architecture, device: str, dtype: str, head: str, head_reason: str
) -> Forward:
    """The torch decoder on a GPU. head_reason: why the head is not what was asked for, if that is known."""
    import torch

    from gemma_awq_cli.kernels.head import head_refusal
    from gemma_awq_cli.kernels.step_ops import steps_problem
    from gemma_awq_cli.models.forward.device_session import DeviceText, fused_ops
    from gemma_awq_cli.models.forward.torch_layers import LayerOps

    report, slow = linear_report(checkpoint, device, dtype)
    text = _torch_text(checkpoint, arch, device, dtype, head)
    if head != DENSE_HEAD and (refused := head_refusal(text.embedding, head)):
        head, head_reason = DENSE_HEAD, refused
    kind = torch.device(device).type
    how = "decode steps are recorded as CUDA graphs" if kind == "cuda" else f"on {kind}"
    problem = steps_problem(text.device, text.dtype, frozenset(layout.head_dim for layout in arch.layouts))
    between = "Triton kernels of this project" if problem is None else f"PyTorch's kernels (not Triton's: {problem})"
    lines = (f"forward: torch, {how}", f"between products: {between}", *report)
    ops = fused_ops() if problem is None else LayerOps()
    return Forward(DeviceText(text, ops), lines, slow, head, head_reason)


def _torch_text(checkpoint: Checkpoint, arch: Architecture, device: str, dtype: str, head: str) -> "TextWeights":
    import torch

    from gemma_awq_cli.models.forward.torch_weights import read_torch_text

    return read_torch_text(checkpoint, arch, torch.device(device), getattr(torch, dtype), head)


def _decoders_refusal(precision: Precision, needed: frozenset[str]) -> str | None:
    """Why neither decoder of our own can run the model, or None."""
    if missing_features(needed, native_weights.FEATURES):
        from gemma_awq_cli.models.forward import torch_decoder

        if missing := missing_features(needed, torch_decoder.FEATURES):
            return missing
    if precision.quantization or precision.attention:
        return "they implement --quantization and --attn"
    return None


def _native_library(
    checkpoint: Checkpoint, arch: Architecture, dtype: str, needed: frozenset[str]
) -> Library | Unavailable:
    """The compiled decoder's library, compiled now if need be, if the decoder can run this model."""
    if dtype != DEFAULT_DTYPE:
        return Unavailable(f"it computes in bfloat16 and float32, not {dtype}")
    reason = missing_features(needed, native_weights.FEATURES) or native_refusal(checkpoint, arch)
    return Unavailable(reason) if reason else native_library.load(cache_folder() / "native")


def linear_report(checkpoint: Checkpoint, device_name: str, dtype_name: str) -> tuple[list[str], str | None]:
    """Which torch kernel each kind of linear gets, line by line; and why one is slow, or None."""
    if checkpoint.packed_linears is None:
        return [f"linears: PyTorch's own products in {dtype_name}"], None
    import torch

    from gemma_awq_cli.kernels import packed_linear

    device, dtype = torch.device(device_name), getattr(torch, dtype_name)
    lines, slow = [], None
    for name, packed in _distinct_linears(checkpoint):
        kernel, refused = packed_linear.choose(packed, device, dtype)
        lines.append(f"{name}: {packed_linear.describe(packed, device, dtype)}")
        if kernel is packed_linear.KERNELS[-1]:
            slow = f"the slow reference kernel ({'; '.join(refused)})"
    return lines, slow


def _distinct_linears(checkpoint: Checkpoint) -> "Iterator[tuple[str, PackedWeight]]":
    """The first packed linear of each name and shape, by the last part of its name (`q_proj`)."""
    known = set()
    for index in range(checkpoint.layers):
        for name, linear in checkpoint.packed(index).items():
            kind = name.rpartition(".")[2]
            if (kind, linear) not in known:
                known.add((kind, linear))
                full = f"model.layers.{index}.{name}"
                yield kind, checkpoint.read_packed({full: linear})[full]
