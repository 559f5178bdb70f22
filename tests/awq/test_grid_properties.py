"""The grid at any finite float32: signed zeros, subnormals, equal weights, and weights that no scale reaches."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gemma_awq_cli.awq.grid import MAX_SCALE, MIN_SCALE, QMAX, Grid, dequantize, minmax_grid, nearest, quantize
from gemma_awq_cli.awq.grid import storable_scale as storable
from tests.properties import examples, floats

GROUP = 8


def rows(values: st.SearchStrategy[float]) -> st.SearchStrategy[Tensor]:
    """Weights [N, K] of one to three rows of two groups; often a group of equal ones."""
    group = st.one_of(st.lists(values, min_size=GROUP, max_size=GROUP), values.map(lambda value: [value] * GROUP))
    row = st.tuples(group, group).map(lambda two: two[0] + two[1])
    return st.lists(row, min_size=1, max_size=3).map(torch.tensor)


@given(st.lists(floats(0.0), min_size=1, max_size=20).map(torch.tensor))
@examples(100)
def test_a_scale_is_the_nearest_that_both_16_bit_dtypes_hold(wanted: Tensor) -> None:
    scale = storable(wanted)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(scale.to(dtype).float(), scale)
    assert torch.equal(storable(scale), scale)
    assert ((scale >= MIN_SCALE) & (scale <= MAX_SCALE)).all()
    reachable = (wanted >= MIN_SCALE) & (wanted <= MAX_SCALE)
    assert ((scale - wanted).abs() <= wanted * 2.0**-8)[reachable].all()


@given(rows(floats()))
@examples(150)
def test_whatever_the_weights_integers_and_numbers_are_in_range(weight: Tensor) -> None:
    grid = minmax_grid(weight, GROUP)
    q = quantize(weight, grid)
    for integers in (q, grid.zero):
        assert torch.equal(integers, integers.round())
        assert ((integers >= 0) & (integers <= QMAX)).all()
    rounded = nearest(weight, grid)
    assert rounded.isfinite().all()
    assert (rounded[weight == 0] == 0).all()
    assert (rounded * weight >= 0).all()  # no weight changes its sign


@given(rows(floats(-QMAX * MAX_SCALE / 2, QMAX * MAX_SCALE / 2)))
@examples(150)
def test_what_a_scale_reaches_is_rounded_to_the_nearest(weight: Tensor) -> None:
    """Half a step; at the ends of a group's range the scale's own rounding and the zero point's come on top."""
    grid = minmax_grid(weight, GROUP)
    rounded = nearest(weight, grid)
    groups, errors = weight.unflatten(1, (-1, GROUP)), (rounded - weight).unflatten(1, (-1, GROUP)).abs()
    step = grid.scale[:, :, None]
    assert (errors <= 1.1 * step).all()
    inside = ((groups / step + grid.zero[:, :, None]) <= QMAX) & ((groups / step + grid.zero[:, :, None]) >= 0)
    assert (errors <= 0.5001 * step)[inside].all()


@st.composite
def on_a_grid(draw: st.DrawFn) -> tuple[Tensor, Grid]:
    shape = (draw(st.integers(1, 3)), 2)
    integers = torch.tensor(draw(st.lists(st.integers(0, QMAX), min_size=shape[0] * 16, max_size=shape[0] * 16)))
    scale, zero = (
        torch.tensor(draw(st.lists(values, min_size=shape[0] * 2, max_size=shape[0] * 2))).view(shape).float()
        for values in (floats(0.0), st.integers(0, QMAX))
    )
    return integers.view(shape[0], 2 * GROUP).float(), Grid(storable(scale), zero)


@given(on_a_grid())
@examples(100)
def test_what_lies_on_the_grid_stays_there(given_: tuple[Tensor, Grid]) -> None:
    q, grid = given_
    weight = dequantize(q, grid)
    assert torch.equal(quantize(weight, grid), q)
    assert torch.equal(nearest(weight, grid), weight)
