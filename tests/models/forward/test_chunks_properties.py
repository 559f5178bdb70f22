"""A prompt may be read in any pieces: the logits are those of reading it at once, in every decoder."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gemma_awq_cli.models.forward import prefill
from gemma_awq_cli.models.forward.loading import OpenModel, open_model
from gemma_awq_cli.models.forward.native_session import NativeSession
from gemma_awq_cli.models.forward.precision import Precision
from gemma_awq_cli.models.forward.prefill import flat_batches
from gemma_awq_cli.models.forward.session import Session
from gemma_awq_cli.models.forward.torch_decoder import DecoderSession
from gemma_awq_cli.system.arrays import as_tensor
from tests.conftest import FORWARDS
from tests.properties import examples

CPU = torch.device("cpu")
CAPACITY = 128
# two rows, beyond the sliding window of 16
ROWS = tuple(
    [2, *torch.randint(6, 260, (n - 1,), generator=torch.Generator().manual_seed(n)).tolist()] for n in (53, 37)
)
# how many tokens of each row a call reads, until both are read
CUTS = st.lists(st.tuples(st.integers(0, 24), st.integers(0, 24)), min_size=1, max_size=6)


def read(session: Session, cuts: Sequence[tuple[int, int]]) -> Tensor:
    """The logits [T, V] after every token of both rows, read in the pieces of `cuts`, the rest at last."""
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    at = [0, 0]
    for counts in (*cuts, (CAPACITY, CAPACITY)):
        pieces = [row[start : start + count] for row, start, count in zip(ROWS, at, counts, strict=True)]
        at = [start + len(piece) for start, piece in zip(at, pieces, strict=True)]
        lengths = [len(piece) for piece in pieces]
        if any(lengths):
            for part, logits in zip(parts, as_tensor(session.last_logits(pieces, lengths)).split(lengths), strict=True):
                part.append(logits)
    logits = torch.cat([*parts[0], *parts[1]])
    assert len(logits) == sum(map(len, ROWS))
    return logits


def apart(given_: Tensor, expected: Tensor) -> Tensor:
    """The relative distance of each position."""
    return (given_ - expected).norm(dim=-1) / expected.norm(dim=-1)


@pytest.fixture(scope="module", params=FORWARDS)
def dense(request: pytest.FixtureRequest, checkpoints: Callable[[str], Path]) -> OpenModel:
    """In float64: between two ways to the same logits, these hard models amplify even the noise of float32."""
    return open_model(checkpoints(request.param), CPU, Precision(dtype=torch.float64))


@pytest.fixture(scope="module", params=FORWARDS)
def compiled(request: pytest.FixtureRequest, artifacts: Callable[[str], Path]) -> OpenModel:
    return open_model(artifacts(request.param), CPU)


@given(cuts=CUTS, chunk=st.sampled_from([3, 13, 512]))
@examples(12, shrink=False)
def test_the_torch_decoder_reads_a_prompt_in_any_pieces(
    dense: OpenModel, cuts: Sequence[tuple[int, int]], chunk: int
) -> None:
    assert isinstance(dense.session(1, 1), DecoderSession)
    expected = read(dense.session(2, CAPACITY), [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill, "CHUNK", chunk)
        logits = read(dense.session(2, CAPACITY), cuts)
    assert (apart(logits, expected) < 1e-3).all()


@given(cuts=CUTS)
@examples(12, shrink=False)
def test_the_compiled_decoder_reads_a_prompt_in_any_pieces(
    compiled: OpenModel, cuts: Sequence[tuple[int, int]]
) -> None:
    if not isinstance(compiled.session(1, 1), NativeSession):
        pytest.skip(compiled.kernel_report()[0])
    # the median: keys of the same chunk are seen before they are rounded to bfloat16, which hard models amplify
    assert apart(read(compiled.session(2, CAPACITY), cuts), read(compiled.session(2, CAPACITY), [])).median() < 0.05


@st.composite
def calls(draw: st.DrawFn) -> tuple[list[list[int]], list[int], list[int]]:
    """New tokens of rows, how many each has read before, and after how many of its last ones logits are wanted."""
    counts = draw(st.lists(st.integers(0, 40), min_size=1, max_size=5))
    tokens = [list(range(count)) for count in counts]
    wanted = [draw(st.integers(0, count)) for count in counts]
    return tokens, draw(st.lists(st.integers(0, 9), min_size=len(counts), max_size=len(counts))), wanted


@given(calls(), st.sampled_from([1, 2, 7, 512]))
@examples(100)
def test_pieces_are_the_rows_in_order_and_no_larger_than_a_chunk(
    call: tuple[list[list[int]], list[int], list[int]], chunk: int
) -> None:
    tokens, lengths, counts = call
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill, "CHUNK", chunk)
        batches = list(flat_batches(tokens, lengths, counts))
    assert all(len(batch.ids) <= max(chunk, len(tokens)) for batch in batches)
    assert all(len(batch.ids) == sum(part.count for part in batch.chunks) for batch in batches)
    parts = [part for batch in batches for part in zip(batch.chunks, batch.wanted, strict=True)]
    for row, new in enumerate(tokens):
        own = [(part, wanted) for part, wanted in parts if part.row == row]
        positions = [position for part, _ in own for position in range(part.start, part.start + part.count)]
        assert positions == list(range(lengths[row], lengths[row] + len(new)))
        # each wanted logit is some chunk's, and no other is
        assert sum(wanted for _, wanted in own) == counts[row]
