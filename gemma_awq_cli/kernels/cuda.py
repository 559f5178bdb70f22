"""PyTorch's own int4 product for NVIDIA GPUs, in bfloat16 (`aten._weight_int4pack_mm`, as gpt-fast uses it).

For few rows the op reads the packed weights; for many the weight is unpacked once and multiplied by cuBLAS. The op's
packed layout is made for tensor cores and documented nowhere, so the place of each nibble is determined by packing
known numbers.

This project has never run it on a GPU: the search for the layout is tested with the CPU's op, the rest on a simulated
device. So a GPU must first multiply known numbers rightly.
"""

import importlib.util
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemma_awq_cli.awq.packing import PackedWeight, unpack_weight
from gemma_awq_cli.kernels.aten_int4 import TILE, pack_tiles, scale_zero, shape_refusal
from gemma_awq_cli.kernels.known_numbers import problem_with

MANY_ROWS = 64


class CudaInt4Linear(nn.Module):
    """packed: int32 in the op's layout; scale_zero: bf16 [K/g, N, 2], w = (q - 8) * scale + zero."""

    packed: Tensor
    scale_zero: Tensor

    @staticmethod
    def refusal(weight: PackedWeight, device: torch.device, dtype: torch.dtype) -> str | None:
        """See `PackedLinear.refusal`."""
        if device.type != "cuda" or torch.version.hip is not None:
            return "it needs an NVIDIA GPU"
        if dtype != torch.bfloat16:
            return "it computes in bfloat16 only"
        if torch.cuda.get_device_capability(device)[0] < 8:
            return "it needs compute capability 8.0 or later"
        return shape_refusal(weight, TILE) or _problem(device)

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        q, grid = unpack_weight(weight)
        self.shape = q.shape
        self.group_size = q.shape[1] // grid.scale.shape[1]
        self.register_buffer("packed", pack_tiles(q), persistent=False)
        self.register_buffer("scale_zero", scale_zero(grid), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        if rows.shape[0] >= MANY_ROWS:
            return F.linear(x, self.dense())
        result = torch.ops.aten._weight_int4pack_mm(rows, self.packed, self.group_size, self.scale_zero)
        return result.view(*x.shape[:-1], -1)

    def dense(self) -> Tensor:
        """Return the weight [N, K] in bf16, as the op sees it."""
        return unpacked_tiles(self.packed, _order(self.packed.device), self.scale_zero, *self.shape)


def _unpacked_tiles(packed: Tensor, order: Tensor, scale_zero: Tensor, outputs: int, inputs: int) -> Tensor:
    """The weight of the op's tensors, [N, K] bf16. order: see `tile_order`."""
    tiles = _nibbles(packed).view(outputs // TILE[0], inputs // TILE[1], -1)[:, :, order]
    q = tiles.unflatten(2, TILE).transpose(1, 2).reshape(outputs, scale_zero.shape[0], -1)
    scale, zero = (part.t().contiguous() for part in scale_zero.unbind(-1))  # [N, G] each
    # rounded once, as in the op
    return torch.addcmul(zero[:, :, None], q.to(torch.bfloat16) - 8, scale[:, :, None]).reshape(outputs, inputs)


# In torch's own dispatcher, so that a GPU has a kernel for it.
unpacked_tiles = torch.library.custom_op("gemma_awq::unpacked_tiles", _unpacked_tiles, mutates_args=())


@unpacked_tiles.register_kernel("cuda")
def _(packed: Tensor, order: Tensor, scale_zero: Tensor, outputs: int, inputs: int) -> Tensor:
    if importlib.util.find_spec("triton") is None:  # as on Windows
        return _unpacked_tiles(packed, order, scale_zero, outputs, inputs)
    from gemma_awq_cli.kernels import triton_products

    with torch.cuda.device(packed.device):
        return triton_products.unpacked_tiles(packed, order, scale_zero, (outputs, inputs), TILE)


@cache
def _problem(device: torch.device) -> str | None:
    """Why the op is not to be used on a device, or None: it is tried on known numbers there, for few rows and many."""
    return problem_with(CudaInt4Linear, device, torch.bfloat16, (4 * TILE[0], 2 * TILE[1]), (1, 17, MANY_ROWS))


def _nibbles(packed: Tensor) -> Tensor:
    """All nibbles of a packed tensor in the order of memory, flat."""
    bytes_ = packed.contiguous().view(-1).view(torch.uint8)
    return torch.stack([bytes_ & 15, bytes_ >> 4], dim=-1).flatten()


@cache
def _order(device: torch.device) -> Tensor:
    return tile_order(lambda q: _nibbles(pack_tiles(q.to(device))), TILE).to(device)


def tile_order(pack: Callable[[Tensor], Tensor], tile: tuple[int, int]) -> Tensor:
    """Return where `pack` (q [N, K] uint8 -> nibbles) puts each value of one tile: tile.flatten() == nibbles[order].

    The index of each place is split into digits of 4 bits, and the tile of each digit is packed.
    """
    count = tile[0] * tile[1]
    places = torch.arange(count)
    found = torch.zeros(count, dtype=torch.int64)
    for shift in range(0, count.bit_length(), 4):
        digits = (places >> shift & 15).to(torch.uint8).view(tile)
        found |= pack(digits).cpu().to(torch.int64) << shift
    return torch.argsort(found)
