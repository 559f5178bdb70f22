"""PyTorch's own int4 product for NVIDIA GPUs, in bfloat16 (`aten._weight_int4pack_mm`, as gpt-fast uses it).

For few rows the op reads the packed weights; for many the weight is unpacked once and multiplied by cuBLAS. The op's
packed layout is made for tensor cores and documented nowhere, so the place of each nibble is determined by packing
known numbers.

This project has never run it on a GPU: the search for the layout is tested with the CPU's op, the rest on a simulated
device. So a GPU must first multiply known numbers rightly.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemma_awq_cli.awq.grid import Grid, dequantize
from gemma_awq_cli.awq.packing import PackedWeight, pack_weight, unpack_weight
from gemma_awq_cli.kernels.aten_int4 import GROUP_SIZES, scale_zero
from gemma_awq_cli.system.failures import first_line

MANY_ROWS = 64
KNOWN_TOLERANCE = 0.01  # of the product of known numbers: bfloat16 rounds by 0.4 %
_INNER_TILES = 8
_TILE = (8, 16 * _INNER_TILES)  # outputs and inputs that the op packs together


class CudaInt4Linear(nn.Module):
    """packed: int32 in the op's layout; scale_zero: bf16 [K/g, N, 2], w = (q - 8) * scale + zero."""

    packed: Tensor
    scale_zero: Tensor

    @staticmethod
    def refusal(weight: PackedWeight, device: torch.device, dtype: torch.dtype) -> str | None:
        """See `PackedLinear.refusal`."""
        inputs, outputs = weight.qweight.shape[0], weight.scales.shape[1]
        if device.type != "cuda" or torch.version.hip is not None:
            return "it needs an NVIDIA GPU"
        if dtype != torch.bfloat16:
            return "it computes in bfloat16 only"
        if torch.cuda.get_device_capability(device)[0] < 8:
            return "it needs compute capability 8.0 or later"
        if outputs % _TILE[0] or inputs % _TILE[1] or inputs // weight.scales.shape[0] not in GROUP_SIZES:
            return f"{outputs} outputs in groups of {inputs // weight.scales.shape[0]} do not fit its tiles"
        return _problem(device)

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        q, grid = unpack_weight(weight)
        self.shape = q.shape
        self.group_size = q.shape[1] // grid.scale.shape[1]
        self.register_buffer("packed", _pack(q), persistent=False)
        self.register_buffer("scale_zero", scale_zero(grid), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        if rows.shape[0] >= MANY_ROWS:
            return F.linear(x, self.dense())
        result = torch.ops.aten._weight_int4pack_mm(rows, self.packed, self.group_size, self.scale_zero)
        return result.view(*x.shape[:-1], -1)

    def dense(self) -> Tensor:
        """Return the weight [N, K] in bf16, as the op sees it."""
        order = _order(self.packed.device)
        tiles = _nibbles(self.packed).view(self.shape[0] // _TILE[0], self.shape[1] // _TILE[1], -1)[:, :, order]
        q = tiles.unflatten(2, _TILE).transpose(1, 2).reshape(self.shape[0], -1, self.group_size)
        scale, zero = (part.t().contiguous() for part in self.scale_zero.unbind(-1))  # [N, G] each
        # rounded once, as in the op
        return torch.addcmul(zero[:, :, None], q.to(torch.bfloat16) - 8, scale[:, :, None]).reshape(self.shape)


@cache
def _problem(device: torch.device) -> str | None:
    """Why the op is not to be used on a device, or None: it is tried on known numbers there, for few rows and many."""
    generator = torch.Generator("cpu").manual_seed(0)
    shape, group = (4 * _TILE[0], 2 * _TILE[1]), 64
    q = torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8)
    sizes = torch.rand(shape[0], shape[1] // group, generator=generator)
    grid = Grid(
        (sizes + 0.5).to(torch.bfloat16).float(), torch.randint(0, 16, sizes.shape, generator=generator).float()
    )
    x = torch.randn(MANY_ROWS, shape[1], generator=generator).to(torch.bfloat16)
    expected = x.float() @ dequantize(q, grid).t()
    try:
        linear = CudaInt4Linear(PackedWeight(*(tensor.to(device) for tensor in pack_weight(q, grid))))
        for rows in (1, 17, MANY_ROWS):
            found = linear(x[:rows].to(device)).cpu().float()
            if not (found - expected[:rows]).norm() <= KNOWN_TOLERANCE * expected[:rows].norm():  # also if it is NaN
                return f"it multiplies known numbers wrongly here ({rows} rows)"
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return f"it fails here: {first_line(error)}"
    return None


def _pack(q: Tensor) -> Tensor:
    """q [N, K] uint8 -> the op's layout. The op takes two inputs per byte, the first in the high half."""
    return torch.ops.aten._convert_weight_to_int4pack((q[:, ::2] << 4 | q[:, 1::2]).contiguous(), _INNER_TILES)


def _nibbles(packed: Tensor) -> Tensor:
    """All nibbles of a packed tensor in the order of memory, flat."""
    bytes_ = packed.contiguous().view(-1).view(torch.uint8)
    return torch.stack([bytes_ & 15, bytes_ >> 4], dim=-1).flatten()


@cache
def _order(device: torch.device) -> Tensor:
    return tile_order(lambda q: _nibbles(_pack(q.to(device))), _TILE).to(device)


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
