"""Triton's kernels in its interpreter against torch; test_triton_kernels.py runs this file with TRITON_INTERPRET=1."""

import pytest
import torch
from torch import Tensor

from gemma_awq_cli.awq import coordinate_descent, gptq
from gemma_awq_cli.awq.grid import Grid, dequantize, minmax_grid
from gemma_awq_cli.awq.packing import PackedWeight, unpack_weight
from gemma_awq_cli.kernels import (
    column_loops,
    plain_ops,
    step_ops,
    triton_attention,
    triton_columns,
    triton_products,
    triton_steps,
)
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


def rounding_problem(columns: int, rows: int, group: int) -> tuple[Tensor, Tensor, Grid]:
    """A Gram matrix [k, k] with strong correlations, a weight [n, k] and its grid."""
    x = torch.randn(2 * columns, columns) @ torch.randn(columns, columns) * columns**-0.5
    weight = torch.randn(rows, columns)
    return x.t() @ x / len(x), weight, minmax_grid(weight, group)


# more than one outer block, blocks that 128 does not divide, rows that 16 does not divide
@pytest.mark.parametrize(("columns", "rows", "group"), [(224, 17, 32), (96, 16, 32)])
def test_one_kernel_for_many_columns_makes_torchs_integers(
    columns: int, rows: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gram, weight, grid = rounding_problem(columns, rows, group)
    gram[5], gram[:, 5] = 0.0, 0.0  # an input that is always 0
    factor = gptq.factor_gram(gram)

    def both() -> tuple[Tensor, Tensor, Tensor]:
        q = gptq.quantize_compensated(weight, grid, factor)
        refined, other = coordinate_descent.refine(q, grid, weight, gram, factor.order, 1, 1)
        return q, refined, other.scale

    for part in (gptq, coordinate_descent):
        monkeypatch.setattr(part, "OUTER_COLUMNS", 160)
    monkeypatch.setattr(gptq, "INNER_COLUMNS", triton_columns.COLUMNS)  # sums in the same order
    monkeypatch.setattr(coordinate_descent, "INNER_COLUMNS", triton_columns.COLUMNS)
    expected = both()
    monkeypatch.setattr(gptq, "round_columns", triton_columns.round_columns)
    monkeypatch.setattr(coordinate_descent, "move_columns", triton_columns.move_columns)
    found = both()
    assert torch.equal(found[0], expected[0])
    assert (found[1] != expected[1]).float().mean() < 0.002  # -1 / curvature is rounded once less in torch
    assert not torch.equal(expected[0], expected[1])


def test_the_trial_on_known_numbers_tells_right_from_wrong() -> None:
    right = triton_columns.round_columns, triton_columns.move_columns
    place = torch.device("cpu")
    assert column_loops.different_integers(*right, place) <= column_loops._DIFFERENT / 4

    def forgetful(target: Tensor, *rest: Tensor) -> None:
        triton_columns.round_columns(target, *rest[:2], torch.zeros_like(rest[2]), *rest[3:])

    assert column_loops.different_integers(forgetful, right[1], place) > 2 * column_loops._DIFFERENT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_between_the_products(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("rms_norm", "add_normed", "add_and_norm", "gated", "place"):
        monkeypatch.setattr(step_ops, name, getattr(triton_steps, name))
    monkeypatch.setattr(step_ops, "attend_once", triton_attention.attend_once)
    bound = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 0.012}[dtype]  # which is cut off, see above
    assert step_ops.furthest_apart(torch.device("cpu"), dtype) < bound


@pytest.mark.parametrize("same", [True, False], ids=["keys are values", "values of their own"])
def test_heads_go_where_they_belong(same: bool) -> None:
    """One key head, a layer without any, norms with and without a gain, rows that read nothing, strides of a view."""
    heads, kv_heads, half = 4, 1, 8
    storage = torch.zeros(3, kv_heads, 6, 2 * half)
    qkv = torch.randn(2, (heads + kv_heads * (1 if same else 2)) * 2 * half)
    cos, sin, at = torch.randn(2, 1, half), torch.randn(2, 1, half), torch.tensor([3, 5])
    norm = torch.randn(2 * half)
    for own, facts in ((kv_heads, (same, True)), (0, (False, False))):
        results = []
        for place in (plain_ops.place, triton_steps.place):
            keys, values = storage.clone(), storage.clone()
            q = place(qkv, norm, None, cos, sin, keys, values, at, heads, own, *facts, 1e-6)
            results.append((q, keys, values))
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert results[1][1][2].count_nonzero() == 0


@pytest.mark.parametrize("programs", [1, 8, 256], ids=["one part", "some parts", "a part per block"])
@pytest.mark.parametrize(("slots", "held", "window"), [(80, 80, 0), (80, 64, 0), (48, 48, 32), (36, 36, 20)])
def test_attention_over_a_ring(
    slots: int, held: int, window: int, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows at the beginning and at any place of the ring, far beyond its window, parts of which no slot is seen."""
    monkeypatch.setattr(triton_attention, "_PROGRAMS", programs)
    last = held - 1 if window == 0 else 5 * slots + 7
    positions = torch.tensor([0, min(30, held - 1), last])
    storage = torch.randn(2, 4, 2, slots + 1, 32)
    keys, values = (part[:3, :, :held] for part in storage)
    q = torch.randn(3, 6, 32)
    for softcap in (0.0, 2.0):
        expected = plain_ops.attend_once(q, keys, values, positions, slots, window, 0.4, softcap)
        found = triton_attention.attend_once(q, keys, values, positions, slots, window, 0.4, softcap)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
