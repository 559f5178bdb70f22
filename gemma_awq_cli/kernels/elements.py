"""What a layer computes of each token by itself, in the compiled library, on torch's tensors in memory.

PyTorch makes a pass over the memory for each operation of a norm or a rotation, and is slow at the function of GELU.
"""

import torch
from torch import Tensor

from gemma_awq_cli.kernels.native.library import Library
from gemma_awq_cli.kernels.native.structures import int64s
from gemma_awq_cli.system.threads import thread_count

DTYPES = (torch.float32, torch.bfloat16)


def rms_norm(library: Library, x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    """Return `x / sqrt(mean(x^2) + eps) * gain` in the dtype of x, computed in float32.

    x: [..., K] of `DTYPES`; gain: [K] float32, None for 1.
    """
    x = _plain(x)
    width = x.shape[-1]
    assert gain is None or (gain.shape == (width,) and gain.dtype == torch.float32 and gain.is_contiguous())
    out = torch.empty_like(x)
    library.norm(
        x.data_ptr(), x.dtype == torch.bfloat16, x.numel() // width, width,
        None if gain is None else gain.data_ptr(), eps, out.data_ptr(), thread_count(),
    )  # fmt: skip
    return out


def gelu_tanh(library: Library, x: Tensor) -> Tensor:
    """Return GELU of each number, as `torch.nn.functional.gelu` with `approximate="tanh"`. x: of `DTYPES`."""
    x = _plain(x)
    out = torch.empty_like(x)
    library.gelu(x.data_ptr(), x.dtype == torch.bfloat16, x.numel(), out.data_ptr(), thread_count())
    return out


def rotate(library: Library, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return heads turned by the places of their tokens, in the dtype of x, computed in float32.

    x: [R, heads, S, D] of `DTYPES`, D even; cos, sin: [1 or R, S, D] float32. The results of a token's heads are next
    to each other in memory.
    """
    assert x.dtype in DTYPES
    x = x if x.stride(-1) == 1 else x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    rows, heads, tokens, size = x.shape
    assert size % 2 == 0
    assert cos.shape == sin.shape
    assert cos.shape in ((1, tokens, size), (rows, tokens, size))
    assert cos.dtype == sin.dtype == torch.float32
    out = torch.empty(rows, tokens, heads, size, dtype=x.dtype)
    strides = [x.stride(dim) for dim in (0, 2, 1)]
    library.rotate(
        x.data_ptr(), x.dtype == torch.bfloat16, int64s(strides), rows, tokens, heads, size,
        cos.data_ptr(), sin.data_ptr(), 0 if len(cos) == 1 else tokens * size, out.data_ptr(), thread_count(),
    )  # fmt: skip
    return out.transpose(1, 2)


def _plain(x: Tensor) -> Tensor:
    """x in memory without gaps, its last dimension next to each other; the others in any order."""
    assert x.dtype in DTYPES
    strides = sorted(zip(x.stride()[:-1], x.shape[:-1], strict=True))
    dense, step = x.stride(-1) == 1 or x.shape[-1] == 1, x.shape[-1]
    for stride, size in strides:
        dense, step = dense and (size == 1 or stride == step), step * size
    return x if dense else x.contiguous()
