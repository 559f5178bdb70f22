"""Rows that the model samples itself: the draw is the softmax, the cache changes nothing, the command records it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gemma_awq_cli.cli.app import main
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.cache import cache_folder
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward.loading import open_model
from gemma_awq_cli.models.forward.precision import Precision
from gemma_awq_cli.quantize import self_sampling
from gemma_awq_cli.quantize.own_rows import AT_ONCE, OwnRows
from gemma_awq_cli.quantize.quality import QUALITIES
from tests.conftest import FAMILIES, quantize_arguments

CPU = torch.device("cpu")


def test_draws_follow_the_softmax() -> None:
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(0)) * 2
    logits[0, 17] = -torch.inf
    draws = self_sampling.draw(logits.expand(40_000, -1).clone(), torch.Generator().manual_seed(1))
    seen = torch.bincount(draws, minlength=300) / len(draws)
    assert seen[17] == 0
    assert float((seen - logits.softmax(-1)[0]).abs().sum()) < 0.1  # total variation of 40000 draws is about 0.06


@pytest.mark.parametrize("kind", FAMILIES)
@torch.inference_mode()
def test_the_cache_changes_nothing(
    kind: str, checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token by token as from the whole row at once, beyond the sliding window too."""
    given: list[Tensor] = []

    def likeliest(logits: Tensor, _: torch.Generator) -> Tensor:
        given.append(logits.float())
        # spread the rows, so that they are not all alike
        return logits.topk(3).indices[torch.arange(3), torch.arange(3)]

    monkeypatch.setattr(self_sampling, "draw", likeliest)
    ids = self_sampling.sample_rows(checkpoints(kind), CPU, OwnRows(3, 40, 40), 0, lambda: None)
    opened = open_model(checkpoints(kind), CPU, Precision("float32"))
    assert (ids[:, 0] == opened.prompter.bos).all()
    whole = opened.model(input_ids=ids).logits[:, :-1].float()
    stepped = torch.stack(given, 1)
    # weights and cache are bfloat16; a wrong mask or position would be as far off as another row is
    assert (stepped - whole).norm(dim=-1).median() < 0.1 * (whole[0] - whole[1]).norm(dim=-1).median()


@pytest.mark.slow
def test_quantize_on_its_own_rows(tmp_path: Path, checkpoints: Callable[[str], Path], text_file: Path) -> None:
    own = quantize_arguments(checkpoints("gemma"), tmp_path / "own", text_file)
    own[own.index("--calibration") + 1] = "self"
    assert main(own) == 0
    calibration = json.loads((tmp_path / "own" / "quantization_report.json").read_text())["calibration"]
    assert calibration["rows"] == 24
    assert "model's own" in calibration["text"]
    best = quantize_arguments(checkpoints("gemma"), tmp_path / "best", text_file, "--quality", "best")
    assert main(best) == 0
    calibration = json.loads((tmp_path / "best" / "quantization_report.json").read_text())["calibration"]
    assert calibration["rows"] == 24 + QUALITIES["best"].sampled_rows


def test_the_same_seed_gives_the_same_rows(checkpoints: Callable[[str], Path]) -> None:
    first, again, other = (
        self_sampling.sample_rows(checkpoints("gemma"), CPU, OwnRows(4, 24, 24), seed, lambda: None)
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("rows", "seq_len", "text_len"), [(2, 40, 9), (3, 12, 12), (AT_ONCE, 12, 7)])
def test_short_texts_are_joined_to_rows(
    rows: int, seq_len: int, text_len: int, checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every token of a row but its BOS is one that was drawn, in the order of the texts."""
    drawn: list[Tensor] = []

    def count_up(logits: Tensor, _: torch.Generator) -> Tensor:
        drawn.append(10 + torch.arange(len(logits)) + sum(len(one) for one in drawn))
        return drawn[-1] % 256

    monkeypatch.setattr(self_sampling, "draw", count_up)
    own, steps = OwnRows(rows, seq_len, text_len), []
    ids = self_sampling.sample_rows(checkpoints("gemma"), CPU, own, 0, lambda: steps.append(1))
    assert len(steps) == own.steps == len(drawn)
    assert ids.shape == (rows, seq_len)
    assert (ids[:, 0] == open_model(checkpoints("gemma"), CPU).prompter.bos).all()
    batches = [torch.stack(drawn[first : first + text_len - 1], 1) for first in range(0, own.steps, text_len - 1)]
    texts = torch.cat([batch.flatten() for batch in batches]) % 256
    assert all(len(batch) <= AT_ONCE for batch in batches)
    assert len(texts) == own.texts * (text_len - 1) < (rows * (seq_len - 1)) + text_len - 1
    assert torch.equal(ids[:, 1:].flatten(), texts[: rows * (seq_len - 1)])


def test_rows_are_sampled_once(checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    sampled = 0
    sample_rows = self_sampling.sample_rows

    def counted(*arguments: object) -> Tensor:
        nonlocal sampled
        sampled += 1
        return sample_rows(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(self_sampling, "sample_rows", counted)

    def rows(seed: int = 0, kind: str = "gemma") -> Tensor:
        return self_sampling.sampled_rows(Checkpoint(checkpoints(kind)), CPU, OwnRows(2, 16, 16), seed, lambda: None)

    first = rows()
    assert torch.equal(rows(), first)
    assert sampled == 1
    assert not torch.equal(rows(seed=1), first)
    assert not torch.equal(rows(kind="gemma2"), first)
    assert sampled == 3
    kept = sorted((cache_folder() / "own-rows").iterdir())
    assert len(kept) == 3
    for path in kept:  # damaged
        path.write_bytes(path.read_bytes()[:20])
    assert torch.equal(rows(), first)
    assert sampled == 4
    # rows that cannot be kept; the compiled library stays where it is, because PyTorch's products may sample others
    monkeypatch.setattr(self_sampling, "cache_folder", lambda: kept[0])
    assert torch.equal(rows(), first)
    assert sampled == 5


def test_a_model_that_does_not_fit_is_not_sampled_from(checkpoints: Callable[[str], Path]) -> None:
    with pytest.raises(GemmaAwqError, match="whole of it in memory"):
        self_sampling.require_memory_to_sample(Checkpoint(checkpoints("gemma")), OwnRows(8, 512, 512), 500_000_000)
