"""The engine over sessions on a GPU, which is simulated: the same tokens, and logits only where they are needed."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.generate.generation import GenerationOptions
from gemma_awq_cli.generate.local_engine import LocalEngine
from gemma_awq_cli.generate.sampling import Sampling
from gemma_awq_cli.models.forward.device_session import DeviceSession
from gemma_awq_cli.models.forward.loading import OpenModel, open_model
from gemma_awq_cli.models.forward.precision import Precision
from gemma_awq_cli.system.arrays import Array
from tests.fake_device import fake_device

PROMPTS = [[2, 40, 41], [2, 50], [2, 60, 61, 62], [2, 70]]
WAYS = {
    "greedy": Sampling(temperature=0.0),
    "penalized": Sampling(temperature=0.0, repetition_penalty=1.3),
    "sampled": Sampling(temperature=1.0, top_k=20, seed=3),
}


def tokens_of(opened: OpenModel, sampling: Sampling) -> list[list[int]]:
    completions = LocalEngine(opened, batch_size=3).complete(PROMPTS, GenerationOptions(9, sampling, []))
    return [completion.tokens for completion in completions]


@pytest.mark.parametrize("way", WAYS)
def test_the_tokens_are_the_cpus(way: str, checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, sampling = checkpoints("gemma3_text"), WAYS[way]
    expected = tokens_of(open_model(folder, "cpu", Precision("float32")), sampling)
    downloaded = []
    whole = DeviceSession.last_logits

    def counted(session: DeviceSession, *arguments: list[list[int]]) -> Array:
        logits = whole(session, *arguments)
        downloaded.append(max(map(len, arguments[0])))
        return logits

    monkeypatch.setattr(DeviceSession, "last_logits", counted)
    with fake_device(capability=(9, 0)):
        with torch.inference_mode():
            opened = open_model(folder, torch.device("cuda", 0), Precision("float32"))
        assert tokens_of(opened, sampling) == expected
    # greedily, logits come down for the prompts alone
    assert (1 in downloaded) == (way != "greedy")


def test_a_model_that_computes_nan_stops(checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_device(capability=(9, 0)):
        with torch.inference_mode():
            opened = open_model(checkpoints("gemma"), torch.device("cuda", 0))
        monkeypatch.setattr(DeviceSession, "likeliest", lambda *_: [-1])
        with pytest.raises(GemmaAwqError, match="NaN"):
            LocalEngine(opened).complete([PROMPTS[0]], GenerationOptions(9, WAYS["greedy"], []))
