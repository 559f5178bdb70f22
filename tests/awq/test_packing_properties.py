"""Packing at any shape and of any integers: the round trip, the order written out bit by bit, and AutoAWQ's reader."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gemma_awq_cli.awq.grid import Grid, dequantize
from gemma_awq_cli.awq.packing import pack_columns, pack_weight, unpack_columns, unpack_weight
from gemma_awq_cli.kernels.autoawq import autoawq_version, dequantize_with_autoawq
from tests.properties import examples

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ's `order_map`


def integers(rows: int, columns: int) -> st.SearchStrategy[Tensor]:
    """Integers 0..15 [rows, columns]."""
    count = rows * columns
    return st.binary(min_size=count, max_size=count).map(
        lambda data: torch.tensor(list(data), dtype=torch.int64).view(rows, columns) % 16
    )


columns = st.tuples(st.integers(1, 5), st.integers(1, 5)).flatmap(lambda size: integers(size[0], 8 * size[1]))


@st.composite
def quantized(draw: st.DrawFn) -> tuple[Tensor, Grid, int]:
    """Integers [N, K], their grid and the group size."""
    outputs, group = 8 * draw(st.integers(1, 2)), draw(st.sampled_from([8, 16, 32]))
    groups = draw(st.integers(1, 3))
    q = draw(integers(outputs, groups * group))
    zero = draw(integers(outputs, groups)).float()
    # eight significant bits, as `storable_scale` leaves them
    mantissas = draw(st.lists(st.integers(128, 255), min_size=outputs * groups, max_size=outputs * groups))
    exponent = draw(st.integers(-24, 0))
    scale = torch.tensor(mantissas, dtype=torch.float32).view(outputs, groups) * 2.0**exponent
    return q, Grid(scale, zero), group


@given(columns)
@examples(60)
def test_each_nibble_holds_the_column_that_autoawq_says(values: Tensor) -> None:
    packed = pack_columns(values)
    assert packed.dtype == torch.int32
    for row, words in zip(values.tolist(), packed.tolist(), strict=True):
        assert len(words) == len(row) // 8
        for place, word in enumerate(words):
            eight = row[8 * place : 8 * place + 8]
            assert word & 0xFFFFFFFF == sum(eight[column] << (4 * nibble) for nibble, column in enumerate(ORDER))
    assert torch.equal(unpack_columns(packed).long(), values)


@given(st.lists(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=3, max_size=3), min_size=1, max_size=4))
@examples(60)
def test_any_words_are_unpacked_and_packed_to_themselves(words: list[list[int]]) -> None:
    packed = torch.tensor(words, dtype=torch.int32)
    assert torch.equal(pack_columns(unpack_columns(packed)), packed)


@given(quantized())
@examples(40)
def test_a_weight_comes_back_as_it_was(weight: tuple[Tensor, Grid, int]) -> None:
    q, grid, _ = weight
    q_read, read = unpack_weight(pack_weight(q, grid))
    assert torch.equal(q_read.long(), q)
    assert torch.equal(read.scale, grid.scale)
    assert torch.equal(read.zero, grid.zero)


@pytest.mark.skipif(autoawq_version() is None, reason="AutoAWQ is not installed")
@given(quantized())
@examples(40)
def test_autoawq_reads_the_same_numbers(weight: tuple[Tensor, Grid, int]) -> None:
    q, grid, group = weight
    theirs = dequantize_with_autoawq(pack_weight(q, grid), group)
    assert theirs is not None
    assert torch.equal(theirs, dequantize(q, grid).t().half())
