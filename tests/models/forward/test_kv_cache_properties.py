"""The cache's rings against a list that forgets nothing: which position lies in which slot, whatever was written."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from gemma_awq_cli.models.forward.cached_attention import slot_positions
from tests.properties import examples

EMPTY = -1


@given(st.integers(1, 20), st.lists(st.integers(1, 30), min_size=1, max_size=8))
@examples(150)
def test_a_slot_holds_the_last_position_that_was_written_there(slots: int, pieces: list[int]) -> None:
    held = [EMPTY] * slots
    written = 0
    for count in pieces:
        for position in range(written, written + count):
            held[position % slots] = position
        written += count
        (found,) = slot_positions(torch.tensor([written]), slots).tolist()
        assert [max(position, EMPTY) for position in found] == held
        # a window is the last `slots` positions and no other
        assert sorted(position for position in found if position >= 0) == list(range(max(0, written - slots), written))


@given(st.integers(1, 20), st.lists(st.integers(0, 200), min_size=1, max_size=8))
@examples(100)
def test_rows_do_not_depend_on_their_company(slots: int, ends: list[int]) -> None:
    together = slot_positions(torch.tensor(ends), slots)
    assert together.shape == (len(ends), slots)
    for row, end in enumerate(ends):
        assert torch.equal(together[row], slot_positions(torch.tensor([end]), slots)[0])
