"""`run_bench` as Python code calls it: a request in, events and a result out."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from gemma_awq_cli.bench.benchmark import run_bench
from gemma_awq_cli.bench.events import Event, Measured, Progress, StageStarted
from gemma_awq_cli.bench.request import BenchOptions, BenchRequest
from gemma_awq_cli.bench.timed_model import held_bytes_per_token
from gemma_awq_cli.cli.app import main
from gemma_awq_cli.errors import UsageError
from gemma_awq_cli.events import Warned

QUICK = {
    "prompt_tokens": 8,
    "new_tokens": 2,
    "repetitions": 2,
    "warmup": 1,
    "threads": 1,
    "device": "cpu",
    "windows": 1,
}


@pytest.mark.usefixtures("in_process")
def test_the_events_of_a_bench(artifacts: Callable[[str], Path]) -> None:
    folder = artifacts("gemma")
    events: list[Event] = []
    options = BenchOptions(**QUICK, compare=("bf16", "no.gguf"))  # type: ignore[arg-type]
    result = run_bench(BenchRequest((str(folder),), options, max_kl=1e-9, min_decode_tps=1e-9), events.append)
    stages = [event.title for event in events if isinstance(event, StageStarted)]
    assert stages == ["Speed", f"Fidelity of {folder}"]
    speed, fidelity = (events.index(StageStarted(stage)) for stage in stages)
    # a step for loading and for each repetition of either model; all come to their end
    assert [event for event in events[speed:fidelity] if isinstance(event, Progress)] == [
        Progress(done, 8) for done in range(1, 9)
    ]
    steps = [event for event in events[fidelity:] if isinstance(event, Progress)]
    assert [step.done for step in steps] == list(range(1, steps[-1].total + 1))
    assert [event.text.split(".")[0] for event in events if isinstance(event, Warned)] == ["no"]
    assert events[-1] == Measured(result.document)
    assert len(result.unmet) == 1
    assert "KL divergence (nats per token) is" in result.unmet[0]
    assert "it must be at most 1e-09" in result.unmet[0]


def test_a_limit_of_what_is_not_measured_is_a_wrong_use() -> None:
    request = BenchRequest(("no such model",), BenchOptions(speed=False), max_rss=1)
    with pytest.raises(UsageError, match=r"A limit for peak RSS \(bytes\) needs --speed"):
        run_bench(request)


def test_buffers_are_read_for_a_token_too() -> None:
    model = nn.Module()
    model.embed_tokens = nn.Embedding(10, 4)
    model.lm_head = nn.Linear(4, 10, bias=False)
    model.register_buffer("scales", torch.zeros(6, dtype=torch.float16))
    assert held_bytes_per_token(model, tied_head=False) == 10 * 4 * 4 + 6 * 2
    model.lm_head.weight = model.embed_tokens.weight
    assert held_bytes_per_token(model, tied_head=True) == 10 * 4 * 4 + 6 * 2


def test_the_usage_line_brackets_the_models_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == 0
    assert "gemma-awq bench [OPTIONS] [MODEL]...\n" in capsys.readouterr().out
