"""Tensors of safetensors files: read by name, checked to be finite, and as bytes."""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.files import REDOWNLOAD
from gemma_awq_cli.models.checkpoints.headers import TensorInfo, opened

_BOUND = re.compile(r"\.(input|output)_(min|max)$")
PIECE_BYTES = 64 * 2**20  # of a large tensor that is copied


def read_tensors(infos: Mapping[str, TensorInfo], names: Iterable[str]) -> dict[str, Tensor]:
    """The named tensors as they are stored, memory-mapped. The files are closed again at once."""
    by_file: dict[Path, list[str]] = {}
    for name in names:
        by_file.setdefault(infos[name].file, []).append(name)
    tensors = {}
    for file, wanted in by_file.items():
        with opened(file, "pt") as handle:
            for name in wanted:
                tensors[name] = _aligned(handle.get_tensor(name))
    return tensors


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, copied if it does not begin at a multiple of its elements' size, as compiled code needs it.

    A file that holds a tensor of an odd size, such as one scalar in bfloat16, may begin others anywhere.
    """
    return tensor if tensor.data_ptr() % tensor.element_size() == 0 else tensor.clone()


def read_pieces(name: str, info: TensorInfo) -> Iterator[Tensor]:
    """Yield a tensor's rows in order, as many at a time as `PIECE_BYTES` hold, each piece checked to be finite.

    Only one piece is in memory at a time, if the receiver keeps none: the file is mapped anew for each.
    """
    rows = info.shape[0] if info.shape else 1
    step = max(1, PIECE_BYTES * rows // max(1, info.nbytes))
    for first in range(0, max(1, rows), step):
        with opened(info.file, "pt") as handle:
            piece = handle.get_tensor(name) if rows <= step else handle.get_slice(name)[first : first + step]
        require_finite(name, piece)
        yield piece
        del piece


def raw_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes, as a safetensors file holds them."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def require_finite(name: str, tensor: Tensor) -> None:
    """An error if a weight holds NaN or infinity. A bound of activations may be infinite: it clips nothing then."""
    # the extremes are one pass without a copy, and a NaN is both of them
    if not tensor.is_floating_point() or not tensor.numel():
        return
    sound = torch.isfinite if not _BOUND.search(name) else lambda extreme: ~torch.isnan(extreme)
    if not all(sound(extreme) for extreme in torch.aminmax(tensor)):
        raise GemmaAwqError(
            f"{name} holds NaN or infinite values.",
            "The checkpoint is damaged or its training diverged. " + REDOWNLOAD,
        )
