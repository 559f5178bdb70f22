"""The compiled attention takes keys in blocks of 128 positions. Which thread meets a block, and what is read beside it,
changes no bit; and what it makes of many blocks is what the torch decoder makes of all keys at once.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from gemma_awq_cli.models.forward.kv_kinds import KV_16BIT, KV_CACHES
from gemma_awq_cli.models.forward.loading import open_model
from gemma_awq_cli.models.forward.native_session import NativeSession
from gemma_awq_cli.models.forward.precision import Precision
from gemma_awq_cli.models.forward.session import Session
from gemma_awq_cli.system.arrays import Array
from tests.models.forward.test_compiled_decoder import arithmetic, native_text

__all__ = ["arithmetic"]  # a fixture

LENGTH = 700  # tokens, of which sliding layers see the last few
ONE_BY_ONE = 12
# heads that share keys and heads that do not, a window, and keys that later layers read
KINDS = ["gemma", "gemma-mqa", "gemma2", "gemma3_text", "gemma4"]


def tokens() -> list[int]:
    return [2, *torch.randint(3, 200, (LENGTH - 1,), generator=torch.Generator().manual_seed(1)).tolist()]


def logits_by(folder: Path, kv_cache: str, threads: int, piece: int) -> Array:
    """The logits of the last tokens, one by one, after the others were read in pieces of so many."""
    torch.set_num_threads(threads)
    session = NativeSession(native_text(folder), 1, LENGTH, kv_cache)
    return last_logits(session, piece)


def last_logits(session: Session, piece: int) -> Array:
    ids = tokens()
    for first in range(0, LENGTH - ONE_BY_ONE, piece):
        session.next_logits([ids[first : min(first + piece, LENGTH - ONE_BY_ONE)]])
    return np.concatenate([session.next_logits([[token]]) for token in ids[-ONE_BY_ONE:]])


@pytest.mark.parametrize("kv_cache", KV_CACHES)
@pytest.mark.parametrize("kind", KINDS)
def test_neither_threads_nor_the_pieces_of_a_prompt_change_a_bit(
    kind: str, kv_cache: str, artifacts: Callable[[str], Path]
) -> None:
    folder = artifacts(kind)
    expected = logits_by(folder, kv_cache, 1, LENGTH)
    assert np.isfinite(expected).all()
    for threads, piece in ((2, LENGTH), (7, 16), (3, 131)):
        assert np.array_equal(logits_by(folder, kv_cache, threads, piece), expected)


@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("kind", KINDS)
def test_many_blocks_are_as_good_as_all_keys_at_once(kind: str, checkpoints: Callable[[str], Path]) -> None:
    """Of 16-bit weights, and with keys in bfloat16: nothing but the order of summation lies between the two."""
    folder = checkpoints(kind)
    given = logits_by(folder, KV_16BIT, 2, LENGTH)
    expected = last_logits(open_model(folder, "cpu", Precision("float32")).session(1, LENGTH), LENGTH)
    apart = np.linalg.norm(given - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert np.median(apart) < 1e-3
