"""Artifacts of every kind of layer, made without the quantizer, against transformers' model of their weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward import prefill
from gemma_awq_cli.models.forward.session import Session
from gemma_awq_cli.models.forward.torch_decoder import DecoderSession
from gemma_awq_cli.models.forward.torch_weights import read_torch_text
from gemma_awq_cli.models.forward.transformers_model import build_model
from gemma_awq_cli.models.forward.transformers_session import TransformersSession
from gemma_awq_cli.models.gemma.architecture import architecture_of
from gemma_awq_cli.system.arrays import as_tensor
from tests.conftest import FAMILIES, FORWARDS
from tests.models.forward.test_torch_decoder import CAPACITY, apart, random_turns, read_by, read_whole
from tests.round_to_nearest import dense_twin, round_checkpoint

CPU = torch.device("cpu")
PROMPTS = (5, 41, 16)  # tokens; the sliding window is 16
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def rounded(checkpoints: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("rounded")

    def get(kind: str) -> Path:
        folder = root / kind
        return folder if folder.exists() else round_checkpoint(checkpoints(kind), folder)

    return get


def torch_session(folder: Path, rows: int) -> Session:
    checkpoint = Checkpoint(folder)
    arch = architecture_of(checkpoint.facts, checkpoint.family)
    return DecoderSession(read_torch_text(checkpoint, arch, CPU, torch.float32), rows, CAPACITY)


def transformers_session(folder: Path, rows: int) -> Session:
    return TransformersSession(build_model(Checkpoint(folder), CPU, torch.float32), rows, CAPACITY, CPU)


def prompts() -> list[list[int]]:
    return [torch.randint(6, 260, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in PROMPTS]


def greedy(session: Session, rows: list[list[int]]) -> Tensor:
    """The greedy tokens [tokens, R] after each row's prompt."""
    chosen = []
    for _ in range(NEW_TOKENS):
        chosen.append(as_tensor(session.next_logits(rows)).argmax(-1))
        rows = [[int(token)] for token in chosen[-1]]
    return torch.stack(chosen)


@pytest.mark.parametrize("chunk", [512, 13])
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_logits_are_those_of_the_unpacked_weights(
    kind: str,
    chunk: int,
    checkpoints: Callable[[str], Path],
    rounded: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prefill, "CHUNK", chunk)
    expected = read_whole(dense_twin(checkpoints(kind), rounded(kind)), random_turns())
    errors = apart(read_by(torch_session(rounded(kind), 3), random_turns()), expected)
    assert errors.median() < 1e-5
    assert errors.max() < 1e-3


@pytest.mark.parametrize("kind", FORWARDS)
def test_greedy_tokens_are_the_same_in_every_forward(
    kind: str, checkpoints: Callable[[str], Path], rounded: Callable[[str], Path]
) -> None:
    expected = greedy(TransformersSession(dense_twin(checkpoints(kind), rounded(kind)), 3, CAPACITY, CPU), prompts())
    for session in (torch_session, transformers_session):
        assert torch.equal(greedy(session(rounded(kind), 3), prompts()), expected)
