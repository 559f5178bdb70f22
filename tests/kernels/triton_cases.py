"""Triton's kernels in its interpreter against torch; test_triton_kernels.py runs this file with TRITON_INTERPRET=1."""

import pytest
import torch

from gemma_awq_cli.awq.grid import dequantize
from gemma_awq_cli.awq.packing import PackedWeight, unpack_weight
from gemma_awq_cli.kernels import triton_products
from gemma_awq_cli.kernels.aten_int4 import scale_zero
from tests.kernels.test_kernels import packed_weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs", "group"), [(1, 72, 256, 64), (3, 64, 384, 128), (8, 136, 160, 32), (5, 1032, 128, 64)]
)
def test_the_product_of_few_rows(rows: int, outputs: int, inputs: int, group: int, dtype: torch.dtype) -> None:
    packed, dense = packed_weight(outputs, inputs, group)
    x = torch.randn(rows, inputs).to(dtype)
    found = triton_products.few_rows_product(x, packed)
    assert found.dtype == dtype
    expected = x.double() @ dense.double().t()
    # the output's rounding and nothing else, which the interpreter, unlike a GPU, cuts off in bfloat16
    assert (found.double() - expected).norm() < (0.006 if dtype == torch.bfloat16 else 0.0006) * expected.norm()


def test_the_parts_of_a_product_cover_all_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    for tiles in (1, 3, 48, 384, 5000):
        for groups in (1, 2, 5, 24, 192):
            splits, per_split = triton_products.splits_of(tiles, groups)
            assert (splits - 1) * per_split < groups <= splits * per_split
    packed, dense = packed_weight(64, 320, 64)
    x = torch.randn(2, 320).to(torch.bfloat16)
    expected = x.float() @ dense.t()
    for programs in (1, 2, 3, 5):
        monkeypatch.setattr(triton_products, "_PROGRAMS", programs)
        found = triton_products.few_rows_product(x, packed)
        assert (found.float() - expected).norm() < 0.006 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_unpacking_gives_the_weight(dtype: torch.dtype) -> None:
    for outputs, inputs, group in ((72, 256, 64), (264, 96, 32)):
        packed, _ = packed_weight(outputs, inputs, group)
        expected = dequantize(*unpack_weight(packed)).to(dtype).t()
        found = triton_products.unpacked(packed, dtype)
        if dtype == torch.bfloat16:  # cut off, see above
            torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)
        else:
            assert torch.equal(found, expected)


def test_unpacking_pytorchs_tiles_gives_the_weight() -> None:
    """In a layout with the nibbles of a tile in any order: the true one is found out on the GPU."""
    tile, (outputs, inputs), group = (8, 128), (24, 384), 64
    packed, _ = packed_weight(outputs, inputs, group)
    q, grid = unpack_weight(PackedWeight(*packed))
    order = torch.randperm(tile[0] * tile[1])
    tiles = q.view(outputs // tile[0], tile[0], inputs // tile[1], tile[1]).transpose(1, 2).flatten(2)
    nibbles = torch.empty_like(tiles)
    nibbles[:, :, order] = tiles
    stored = (nibbles[..., ::2] | nibbles[..., 1::2] << 4).contiguous().view(torch.int32)
    pairs = scale_zero(grid).float()  # whose bfloat16 the interpreter would cut off
    scale, zero = (part.t()[:, :, None] for part in pairs.unbind(-1))
    expected = torch.addcmul(zero, q.view(outputs, -1, group).float() - 8, scale).reshape(outputs, inputs)
    found = triton_products.unpacked_tiles(stored, order, pairs, (outputs, inputs), tile)
    assert torch.equal(found, expected)
