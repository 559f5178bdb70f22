"""The boundary to vLLM, against a stand-in that behaves as its LLMEngine does: the flags, the rows, the ends of rows.

The stand-in answers with transformers' own greedy tokens, some rows faster than others, and its own request order.
"""

import importlib.machinery
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from gemma_awq_cli.cli.app import main
from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.generate import vllm_engine
from gemma_awq_cli.generate.generation import Completion, GenerationOptions
from gemma_awq_cli.generate.local_engine import LocalEngine
from gemma_awq_cli.generate.sampling import Sampling
from gemma_awq_cli.generate.vllm_engine import VllmEngine, engine_arguments, sampling_arguments
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward.loading import open_model
from gemma_awq_cli.models.forward.precision import Precision
from gemma_awq_cli.models.text.prompter import Prompter

ROWS = [[2, 40, 41, 42], [2, 50], [2, 60, 61]]


@dataclass(slots=True)
class EngineArgs:
    """vLLM's, of the parameters that are used; any other is an error, as vLLM's own dataclass makes it."""

    model: str
    dtype: str = "auto"
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    gpu_memory_utilization: float = 0.9
    limit_mm_per_prompt: dict[str, int] = field(default_factory=dict)
    disable_log_stats: bool = False
    use_tqdm_on_load: bool = True


@dataclass(slots=True)
class SamplingParams:
    """vLLM's, as `EngineArgs`."""

    max_tokens: int | None = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    detokenize: bool = True


class FakeEngine:
    """One token a step for the row that is furthest behind; a row ends at its limit or at a stop token."""

    def __init__(self, folder: str) -> None:
        artifact = Checkpoint(Path(folder)).quantization is not None
        precision = None if artifact else Precision(torch.float32)
        self.local = LocalEngine(open_model(Path(folder), torch.device("cpu"), precision))
        self.local.ends = set()
        self.waiting: dict[str, Any] = {}
        self.aborted: list[str] = []

    @classmethod
    def from_engine_args(cls, arguments: EngineArgs) -> "FakeEngine":
        if arguments.tensor_parallel_size > 4:
            raise ValueError("World size (8) is larger than the number of available GPUs (0)\nand more lines")
        cls.arguments = arguments
        cls.last = cls(arguments.model)
        return cls.last

    def add_request(self, name: str, prompt: dict[str, list[int]], parameters: SamplingParams) -> None:
        (whole,) = self.local.complete([prompt["prompt_token_ids"]], GenerationOptions(parameters.max_tokens))
        self.waiting[name] = SimpleNamespace(tokens=whole.tokens, given=0, parameters=parameters)

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting)

    def step(self) -> list[Any]:
        name, request = min(reversed(list(self.waiting.items())), key=lambda item: item[1].given)
        request.given += 1
        tokens = request.tokens[: request.given]
        finished = len(tokens) == request.parameters.max_tokens or tokens[-1] in request.parameters.stop_token_ids
        if finished:
            del self.waiting[name]
        return [SimpleNamespace(request_id=name, outputs=[SimpleNamespace(token_ids=tokens)], finished=finished)]

    def abort_request(self, names: list[str]) -> None:
        self.aborted += names
        for name in names:
            self.waiting.pop(name, None)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> type[FakeEngine]:
    module = ModuleType("vllm")
    module.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    module.EngineArgs = EngineArgs  # type: ignore[attr-defined]
    module.SamplingParams = SamplingParams  # type: ignore[attr-defined]
    module.LLMEngine = FakeEngine  # type: ignore[attr-defined]
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL", "VLLM_LOGGING_STREAM", "VLLM_NO_USAGE_STATS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setitem(sys.modules, "vllm", module)
    return FakeEngine


def open_engine(folder: Path, context: int = 256, **options: Any) -> VllmEngine:
    return VllmEngine(Checkpoint(folder), Prompter(folder), context, 4, **options)


@pytest.mark.parametrize("kind", ["gemma", "gemma2"])
def test_rows_end_as_the_local_engine_ends_them(
    kind: str, vllm: type[FakeEngine], checkpoints: Callable[[str], Path]
) -> None:
    local = LocalEngine(open_model(checkpoints(kind), torch.device("cpu"), Precision(torch.float32)))
    (free,) = local.complete([ROWS[0]], GenerationOptions(9), lambda *_: None)
    for options in (GenerationOptions(9), GenerationOptions(9, stop=(free.text[1:3],))):
        engine = open_engine(checkpoints(kind))
        pieces: dict[int, str] = {0: "", 1: "", 2: ""}
        done: dict[int, Completion] = {}

        def on_text(row: int, piece: str, pieces: dict[int, str] = pieces) -> None:
            pieces[row] += piece

        ours = engine.complete(ROWS, options, on_text, done.__setitem__)
        theirs = local.complete(ROWS, options)
        assert [(row.tokens, row.text, row.finish) for row in ours] == [
            (row.tokens, row.text, row.finish) for row in theirs
        ]
        assert list(pieces.values()) == [row.text for row in ours]
        assert [done[index] for index in range(3)] == ours
        assert not vllm.last.waiting
    assert vllm.last.aborted  # the row that a stop text ended was called off


def test_an_interruption_calls_the_rows_off_and_keeps_their_text(
    vllm: type[FakeEngine], checkpoints: Callable[[str], Path]
) -> None:
    engine = open_engine(checkpoints("gemma"))
    steps = iter(range(5))
    step = vllm.last.step

    def interrupted() -> list[Any]:
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return step()

    vllm.last.step = interrupted  # type: ignore[method-assign]
    rows = engine.complete(ROWS, GenerationOptions(9), lambda *_: None)
    assert {row.finish for row in rows} == {"interrupted"}
    assert sorted(len(row.tokens) for row in rows) == [1, 2, 2]
    assert not vllm.last.waiting
    vllm.last.step = step  # type: ignore[method-assign]
    assert len(engine.complete(ROWS, GenerationOptions(4), lambda *_: None)) == 3  # and the engine goes on


def test_the_flags_are_the_familys(checkpoints: Callable[[str], Path]) -> None:
    def flags(kind: str) -> dict[str, Any]:
        return engine_arguments(Checkpoint(checkpoints(kind)), 2, 3, 100, 8, None)

    assert flags("gemma")["dtype"] == "bfloat16"
    assert flags("gemma2")["dtype"] == flags("gemma3_text")["dtype"] == "bfloat16"  # vLLM refuses float16
    assert flags("gemma3")["limit_mm_per_prompt"] == {"image": 0}
    assert "limit_mm_per_prompt" not in flags("gemma3_text")
    flag = flags("gemma")
    assert (flag["tensor_parallel_size"], flag["pipeline_parallel_size"], flag["max_model_len"]) == (2, 3, 100)


def test_sampling_is_passed_on() -> None:
    greedy = sampling_arguments(Sampling(), 7, 0, {1})
    assert (greedy["temperature"], greedy["max_tokens"], greedy["stop_token_ids"]) == (0.0, 7, [1])
    sampled = [sampling_arguments(Sampling(0.5, 64, 0.95, seed=1), 7, row, {1}) for row in (0, 1, 0)]
    assert (sampled[0]["temperature"], sampled[0]["top_k"], sampled[0]["top_p"]) == (0.5, 64, 0.95)
    assert sampled[0] == sampled[2]
    assert sampled[0]["seed"] != sampled[1]["seed"]


def test_from_the_command_line(
    vllm: type[FakeEngine], artifacts: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(artifacts("gemma3_text"))
    capsys.readouterr()
    more = ["--engine", "vllm", "--tensor-parallel", "2", "--pipeline-parallel", "2", "--max-new-tokens", "3"]
    assert main(["run", "Hello", "-m", folder, *more]) == 0
    with_vllm = capsys.readouterr().out.splitlines()
    assert main(["run", "Hello", "-m", folder, "--max-new-tokens", "3", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines() == with_vllm
    assert vllm.arguments.tensor_parallel_size == 2
    assert vllm.arguments.pipeline_parallel_size == 2
    assert vllm.arguments.dtype == "bfloat16"
    assert vllm.arguments.max_model_len == len("Hello") + 1 + 3
    assert main(["run", "Hello", "-m", folder, "--engine", "vllm", "--tensor-parallel", "8"]) == 1
    assert "World size (8) is larger than the number of available GPUs (0)\nhint" in capsys.readouterr().err
    for wrong in (["--quantization", "nf4"], ["--attn", "sdpa"], ["--device", "cpu"], ["--dtype", "bfloat16"]):
        assert main(["run", "Hello", "-m", folder, "--engine", "vllm", *wrong]) == 2
    assert main(["run", "Hello", "-m", folder, "--tensor-parallel", "2"]) == 2


def test_without_vllm_the_extra_is_named(checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(GemmaAwqError, match="vLLM is not installed") as caught:
        open_engine(checkpoints("gemma"))
    assert '"vllm>=0.33"' in caught.value.hint


def test_an_artifact_takes_no_dtype(artifacts: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match="is a 4-bit artifact"):
        open_engine(artifacts("gemma"), dtype="float16")


def test_every_token_is_timed_and_no_end_of_text_ends_a_row(
    vllm: type[FakeEngine], checkpoints: Callable[[str], Path]
) -> None:
    engine = open_engine(checkpoints("gemma"), memory_share=0.25)
    assert vllm.arguments.gpu_memory_utilization == 0.25
    engine.ends = set(range(264))
    first, steps = engine.timed(ROWS, 5)
    assert len(steps) == 4  # after the first token of all rows
    assert min(first, *steps) > 0
    assert not vllm.last.has_unfinished_requests()
