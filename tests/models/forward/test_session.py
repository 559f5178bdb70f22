"""A session's rows are read as if each were alone: padding, batches, windows and several feeds change nothing."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gemma_awq_cli.models.forward.loading import OpenModel, open_model
from gemma_awq_cli.models.forward.session import Session
from gemma_awq_cli.models.forward.transformers_session import TransformersSession
from gemma_awq_cli.system.arrays import as_tensor
from tests.conftest import FORWARDS

CPU = torch.device("cpu")
LENGTHS = (5, 41, 16, 23)  # the sliding window is 16: shorter, much longer, exactly as long
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def opened(checkpoints: Callable[[str], Path]) -> Callable[[str], OpenModel]:
    """The 16-bit model in float32: what remains between two ways to the same logits is rounding noise."""
    models: dict[str, OpenModel] = {}

    def get(kind: str) -> OpenModel:
        if kind not in models:
            models[kind] = open_model(checkpoints(kind), CPU)
            with torch.inference_mode():
                models[kind].model.float()
        return models[kind]

    return get


def session(opened: OpenModel, rows: int, capacity: int = 128) -> Session:
    return TransformersSession(opened.model, rows, capacity, CPU)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [[2, *torch.randint(6, 260, (n - 1,), generator=generator).tolist()] for n in LENGTHS]


def greedy(session: Session, rows: list[list[int]], tokens: int) -> tuple[list[list[int]], Tensor]:
    """The greedy tokens of every row and the logits [tokens, R, V] that they were chosen from."""
    chosen: list[list[int]] = [[] for _ in rows]
    kept = []
    for _ in range(tokens):
        logits = as_tensor(session.next_logits(rows))
        kept.append(logits)
        rows = [[int(token)] for token in logits.argmax(-1)]
        for given, row in zip(chosen, rows, strict=True):
            given += row
    return chosen, torch.stack(kept)


@torch.inference_mode()
def forward(opened: OpenModel, ids: list[int]) -> Tensor:
    """transformers' forward of the whole row at once, without cache or padding: the logits after the last token."""
    return opened.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]


def apart(given: Tensor, expected: Tensor) -> float:
    """Relative distance. These hard models amplify float32's noise to some 1e-4; a wrong mask gives 0.1 and more."""
    return float((given - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", FORWARDS)
def test_padding_does_not_change_a_row(kind: str, opened: Callable[[str], OpenModel]) -> None:
    model = opened(kind)
    together, logits = greedy(session(model, len(LENGTHS)), prompts(), NEW_TOKENS)
    for index, ids in enumerate(prompts()):
        (alone,), expected = greedy(session(model, 1), [ids], NEW_TOKENS)
        assert together[index] == alone
        assert apart(logits[:, index], expected[:, 0]) < 1e-3
        # and all of it is what transformers computes without any cache
        assert apart(logits[-1, index], forward(model, [*ids, *alone[:-1]])) < 1e-3


@pytest.mark.parametrize("kind", FORWARDS)
def test_several_feeds_equal_one(kind: str, opened: Callable[[str], OpenModel]) -> None:
    """A chat's turns: pieces of any length, below and beyond the sliding window, into the live session."""
    model = opened(kind)
    (ids,) = [[2, *torch.randint(6, 260, (89,), generator=torch.Generator().manual_seed(6)).tolist()]]
    live = session(model, 1)
    at = 0
    for length in (3, 1, 20, 1, 1, 16, 33, 15):
        logits = as_tensor(live.next_logits([ids[at : at + length]]))
        at += length
        assert apart(logits[0], forward(model, ids[:at])) < 1e-3
    assert at == len(ids)


@pytest.mark.parametrize("kind", FORWARDS)
def test_ragged_rows_take_further_pieces(kind: str, opened: Callable[[str], OpenModel]) -> None:
    model = opened(kind)
    rows = prompts()
    live = session(model, len(rows))
    live.next_logits(rows)
    more = torch.randint(6, 260, (len(rows), 19), generator=torch.Generator().manual_seed(7)).tolist()
    logits = as_tensor(live.next_logits(more))
    for index, ids in enumerate(rows):
        assert apart(logits[index], forward(model, [*ids, *more[index]])) < 1e-3
