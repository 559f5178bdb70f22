"""Folds over every dtype that is stored, odd gains and scales included: the fold is exact, or the channel is left."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gemma_awq_cli.awq.fold import fold_into_norm, repeat_heads, tie_heads
from tests.properties import examples, floats

DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])
OFFSETS = st.sampled_from([0.0, 1.0])
SCALES = st.one_of(st.just(1.0), st.floats(2.0**-20, 2.0**20, width=32), st.floats(0.5, 2.0, width=32))


@st.composite
def norms(draw: st.DrawFn, values: st.SearchStrategy[float]) -> tuple[Tensor, Tensor, float]:
    """A norm's stored weight, the wanted scale, and the offset of the gain."""
    size = draw(st.integers(1, 24))
    weight = torch.tensor(draw(st.lists(values, min_size=size, max_size=size))).to(draw(DTYPES))
    scale = torch.tensor(draw(st.lists(SCALES, min_size=size, max_size=size)))
    return weight, scale, draw(OFFSETS)


@given(norms(floats(-1e4, 1e4)))
@examples(250)
def test_gain_and_scale_multiply_to_the_old_gain(norm: tuple[Tensor, Tensor, float]) -> None:
    """As they are stored, and in float64: only the division that made the scale was rounded."""
    weight, scale, offset = norm
    folded, exact = fold_into_norm(weight, scale, offset)
    assert folded.dtype == weight.dtype
    assert exact.dtype == torch.float32
    assert (exact > 0).all()
    # float32 holds the gains that a forward computes
    before, after = ((offset + stored.float()).double() for stored in (weight, folded))
    assert ((after * exact.double() - before).abs() <= before.abs() * 2.0**-23).all()
    kept = exact == 1
    assert torch.equal(folded[kept & (scale == 1)], weight[kept & (scale == 1)])
    assert kept[before == 0].all()
    assert torch.equal(folded[before == 0], weight[before == 0])


@given(norms(floats(-4.0, 4.0)))
@examples(150)
def test_ordinary_scales_are_taken_up_as_far_as_the_dtype_holds_them(norm: tuple[Tensor, Tensor, float]) -> None:
    """No channel is left unless its gain would vanish, and the scale is the wanted one but for the stored rounding."""
    weight, scale, offset = norm
    scale = scale.clamp(0.5, 2.0)
    _, exact = fold_into_norm(weight, scale, offset)
    gain = offset + weight.double()
    wanted = gain / scale.double()
    step = torch.finfo(weight.dtype).eps * (wanted - offset).abs() + torch.finfo(weight.dtype).smallest_normal
    # the stored weight's rounding moves the gain by less than a quarter, and the product of both gains is no zero
    safe = (wanted.abs() > 4 * step) & (gain.abs() > 1e-15)
    error = (exact.double() / scale.double() - 1).abs()
    assert (error <= (1.5 * step / wanted.abs()) + 1e-6)[safe].all()


@given(norms(floats()))
@examples(100)
def test_no_weight_makes_a_scale_that_is_no_number(norm: tuple[Tensor, Tensor, float]) -> None:
    weight, scale, offset = norm
    weight = torch.where(weight.isfinite(), weight, torch.ones_like(weight))  # a checkpoint with others is refused
    folded, exact = fold_into_norm(weight, scale, offset)
    assert folded.isfinite().all()
    assert exact.isfinite().all()
    assert (exact > 0).all()


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**31))
@examples(60)
def test_query_heads_share_the_scale_of_their_kv_head(kv_heads: int, repeats: int, head_dim: int, seed: int) -> None:
    scale = torch.rand(kv_heads * head_dim, generator=torch.Generator().manual_seed(seed)) + 0.5
    repeated = repeat_heads(scale, kv_heads * repeats, head_dim)
    for column in range(kv_heads * repeats * head_dim):
        head, channel = divmod(column, head_dim)
        assert repeated[column] == scale[(head // repeats) * head_dim + channel]
    torch.testing.assert_close(tie_heads(repeated, kv_heads, head_dim), scale)
