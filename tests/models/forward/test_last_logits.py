"""Logits of many positions at once, and one row that becomes several, are what feeding token by token gives."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gemma_awq_cli.models.forward import prefill
from gemma_awq_cli.models.forward.loading import OpenModel, open_model
from gemma_awq_cli.models.forward.native_session import NativeSession
from gemma_awq_cli.models.forward.native_weights import NativeText
from gemma_awq_cli.models.forward.precision import Precision
from gemma_awq_cli.models.forward.session import Session
from gemma_awq_cli.models.forward.torch_decoder import DecoderSession
from gemma_awq_cli.models.forward.transformers_session import TransformersSession
from gemma_awq_cli.system.arrays import as_tensor
from tests.conftest import FORWARDS
from tests.models.forward.test_session import apart

CPU = torch.device("cpu")
PREFIX = 21  # beyond the sliding window of 16
TAILS, COUNTS = (30, 2, 17), (19, 2, 1)


def texts() -> tuple[list[int], list[list[int]]]:
    generator = torch.Generator().manual_seed(8)
    draw = lambda n: torch.randint(6, 260, (n,), generator=generator).tolist()  # noqa: E731
    return [2, *draw(PREFIX - 1)], [draw(n) for n in TAILS]


def at_once(session: Session) -> list[Tensor]:
    """The common prefix once, then all tails: the wanted logits of each row."""
    prefix, tails = texts()
    session.next_logits([prefix])
    session.repeat_row(len(tails))
    return list(as_tensor(session.last_logits(tails, COUNTS)).split(COUNTS))


def one_by_one(open_session: Callable[[], Session]) -> list[Tensor]:
    """Each row alone, its tail token by token."""
    prefix, tails = texts()
    result = []
    for tail, count in zip(tails, COUNTS, strict=True):
        session = open_session()
        session.next_logits([prefix])
        result.append(torch.cat([as_tensor(session.next_logits([[token]])) for token in tail])[-count:])
    return result


def widened(opened: OpenModel, dtype: torch.dtype = torch.float32) -> OpenModel:
    with torch.inference_mode():
        opened.model.to(dtype)
    return opened


@pytest.mark.parametrize("chunk", [512, 13])
@pytest.mark.parametrize("kind", FORWARDS)
def test_both_forwards_with_little_noise(
    kind: str, chunk: int, checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, because hard models amplify even the noise of float32; transformers' experts have no float64."""
    monkeypatch.setattr(prefill, "CHUNK", chunk)
    dtype = torch.float32 if kind == "gemma4-experts" else torch.float64
    opened = open_model(checkpoints(kind), CPU, Precision(dtype=dtype))
    assert isinstance(opened.session(1, 1), DecoderSession)
    expected = one_by_one(lambda: opened.session(1, 64))
    theirs = widened(open_model(checkpoints(kind), CPU), dtype)
    for session in (opened.session(1, 64), TransformersSession(theirs.model, 1, 64, CPU)):
        for given, wanted in zip(at_once(session), expected, strict=True):
            assert given.shape == wanted.shape
            assert apart(given, wanted) < 1e-3


@pytest.mark.parametrize("kind", FORWARDS)
def test_the_compiled_forward(kind: str, artifacts: Callable[[str], Path]) -> None:
    opened = open_model(artifacts(kind), CPU)
    if not isinstance(opened.forward.text, NativeText):
        pytest.skip(opened.kernel_report()[0])
    assert isinstance(opened.session(1, 1), NativeSession)
    expected = one_by_one(lambda: opened.session(1, 64))
    errors = [
        (given - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        for given, wanted in zip(at_once(opened.session(1, 64)), expected, strict=True)
    ]
    # the median: keys of the same chunk are seen before they are rounded to bfloat16, which hard models amplify
    assert torch.cat(errors).median() < 0.05


def test_rows_that_were_padded_are_refused(checkpoints: Callable[[str], Path]) -> None:
    opened = open_model(checkpoints("gemma"), CPU)
    session = TransformersSession(opened.model, 2, 16, CPU)
    session.next_logits([[2, 7], [2]])
    with pytest.raises(ValueError, match="different numbers of tokens"):
        session.last_logits([[7], [7]], [1, 1])
