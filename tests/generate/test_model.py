"""The Python API for running: the same text as the command, whole or in pieces, and errors that name the argument."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma_awq_cli.cli import options
from gemma_awq_cli.cli.app import main
from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.events import Warned
from gemma_awq_cli.generate.events import Event, ModelOpened
from gemma_awq_cli.generate.generation import Completion
from gemma_awq_cli.generate.model import Model, load_model
from gemma_awq_cli.generate.request import CHOICES
from tests.tiny import make_checkpoint, original_model


@pytest.fixture(scope="module")
def artifact(artifacts: Callable[[str], Path]) -> Model:
    return load_model(artifacts("gemma3_text"), device="cpu")


@pytest.fixture(scope="module")
def instruct_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("instruct") / "gemma2", "gemma2", chat=True)


@pytest.fixture(scope="module")
def instruct(instruct_folder: Path) -> Model:
    return load_model(instruct_folder, device="cpu", dtype="float32")


def text_of_command(folder: Path, prompt: str, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    capsys.readouterr()
    assert main(["run", prompt, "-m", str(folder), "--device", "cpu", "--json", *more]) == 0
    return str(json.loads(capsys.readouterr().out)["text"])


def test_it_generates_what_the_command_prints(
    artifact: Model, artifacts: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = artifacts("gemma3_text")
    completion = artifact.generate("Hello", max_new_tokens=9)
    assert isinstance(completion, Completion)
    assert completion.text == text_of_command(folder, "Hello", capsys, "--max-new-tokens", "9")
    assert completion.prompt_tokens == len("Hello") + 1
    assert len(completion.tokens) == 9
    sampled = artifact.generate("Hello", max_new_tokens=9, temperature=1.5, top_k=50, top_p=0.9, seed=4).text
    more = ["--max-new-tokens", "9", "--temperature", "1.5", "--top-k", "50", "--top-p", "0.9", "--seed", "4"]
    assert sampled == text_of_command(folder, "Hello", capsys, *more)
    assert sampled != completion.text


def test_structured_answers_as_on_the_command_line(instruct: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llguidance")
    monkeypatch.setattr(instruct._engine, "context", 2048)  # room for the description of a tool
    assert instruct.generate("Go", json_schema={"enum": ["a", 12]}).text in ('"a"', "12")
    assert instruct.chat([{"role": "user", "content": "Go"}], json_schema={"const": 12}).text == "12"
    assert set("".join(instruct.stream("Go", grammar="start: /[ab]{3}/"))) <= {"a", "b"}
    tools = [{"type": "function", "function": {"name": "f"}}]
    told = instruct.generate("Go", tools=tools, max_new_tokens=1).prompt_tokens
    assert told > instruct.generate("Go", max_new_tokens=1).prompt_tokens + 50
    for wrong, message in (
        ({"json_schema": {}, "tools": tools}, "exclude each other"),
        ({"json_schema": 3}, "not a JSON object"),
        ({"grammar": "start: missing"}, "cannot be used"),
        ({"tools": [{"name": "a b"}]}, "tools, tool 1: function.name"),
        ({"tools": []}, "tools is not a list"),
    ):
        with pytest.raises(GemmaAwqError, match=message):
            instruct.generate("Go", **wrong)


def test_log_probabilities_are_transformers_whatever_the_sampling(checkpoints: Callable[[str], Path]) -> None:
    folder = checkpoints("gemma3_text")
    model = load_model(folder, device="cpu", dtype="float32")
    settings: dict[str, Any] = {"temperature": 1.5, "top_k": 9, "seed": 2, "presence_penalty": 1.5, "min_p": 0.01}
    completion = model.generate("Hello", max_new_tokens=9, logprobs=3, **settings)
    ids = [2, *model._engine.prompter.ids("Hello")]
    with torch.inference_mode():
        logits = original_model(folder, dtype=torch.float32)(torch.tensor([[*ids, *completion.tokens]])).logits
    own = logits[0, len(ids) - 1 : -1].log_softmax(-1)
    assert [each.token for each in completion.logprobs] == completion.tokens
    for each, row in zip(completion.logprobs, own, strict=True):
        assert each.logprob == pytest.approx(float(row[each.token]), abs=1e-3)
        values, tokens = row.topk(3)
        assert [token for token, _ in each.top] == tokens.tolist()
        assert [logprob for _, logprob in each.top] == pytest.approx(values.tolist(), abs=1e-3)
    assert model.generate("Hello", max_new_tokens=9, **settings).tokens == completion.tokens
    with pytest.raises(TypeError, match="unexpected keyword argument 'mirostat'"):
        model.generate("Hello", mirostat=2)  # type: ignore[call-arg]


def test_an_instruct_model_gets_its_template(
    instruct: Model, instruct_folder: Path, artifact: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    assert instruct.is_chat
    assert not artifact.is_chat
    answer = instruct.generate("Hi", max_new_tokens=6, system="Be brief.")
    more = ["--max-new-tokens", "6", "--dtype", "float32"]
    assert answer.text == text_of_command(instruct_folder, "Hi", capsys, *more, "--system", "Be brief.")
    raw = instruct.generate("Hi", max_new_tokens=6, raw=True)
    assert raw.prompt_tokens == 3  # BOS and two letters
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert instruct.chat(messages, max_new_tokens=6).tokens == answer.tokens
    assert messages[-1] == {"role": "user", "content": "Hi"}


def test_a_longer_prompt_reads_only_what_is_new(artifact: Model) -> None:
    first = artifact.generate("Hello", max_new_tokens=1)
    assert first.read_tokens == first.prompt_tokens
    longer = artifact.generate("Hello there", max_new_tokens=4)
    assert longer.prompt_tokens == len("Hello there") + 1
    assert longer.read_tokens == len(" there")
    again = artifact.generate("Hello there", max_new_tokens=4)
    assert again.read_tokens == longer.read_tokens  # from where the last prompt began
    assert again.tokens == longer.tokens


@pytest.mark.parametrize("kind", ["artifact", "instruct"])
def test_the_streamed_pieces_are_the_text(kind: str, request: pytest.FixtureRequest) -> None:
    model: Model = request.getfixturevalue(kind)
    whole = model.generate("Hello there", max_new_tokens=40, temperature=1.0, seed=2)
    pieces = list(model.stream("Hello there", max_new_tokens=40, temperature=1.0, seed=2))
    assert "".join(pieces) == whole.text
    assert all(pieces)
    assert len(pieces) > 1


def test_a_stream_generates_no_further_than_it_is_read(instruct: Model) -> None:
    pieces = instruct.stream("Hello there", max_new_tokens=100_000, temperature=2.0, seed=1)
    first = next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert instruct.generate("Hello there", max_new_tokens=40, temperature=2.0, seed=1).text.startswith(first)


def test_a_stop_string_may_be_one_text_or_several(artifact: Model) -> None:
    options: dict[str, Any] = {"max_new_tokens": 40, "temperature": 1.0, "seed": 2}
    whole = artifact.generate("Hello", **options).text
    stop = whole[4:6]
    assert len(stop) == 2
    for given in (stop, [stop], ("no such text", stop)):
        completion = artifact.generate("Hello", **options, stop=given)
        assert completion.finish == "stop"
        assert completion.text == whole[: whole.index(stop)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_new_tokens": 0}, "Invalid max_new_tokens: 0"),
        ({"temperature": -1.0}, "Invalid temperature: -1.0"),
        ({"temperature": float("nan")}, "Invalid temperature: nan"),
        ({"top_p": 1.5}, r"Invalid top-p: 1\.5"),
        ({"top_k": -1}, "Invalid top-k: -1"),
        ({"min_p": 1.5}, r"Invalid min-p: 1\.5"),
        ({"repetition_penalty": 0.0}, "Invalid repetition penalty: 0"),
        ({"presence_penalty": 3.0}, "Invalid presence penalty: 3"),
        ({"frequency_penalty": float("nan")}, "Invalid frequency penalty: nan"),
        ({"logprobs": 21}, "Invalid logprobs: 21"),
        ({"system": "Be brief."}, "needs a model with a chat template"),
    ],
)
def test_a_wrong_argument_is_named(wrong: dict[str, Any], message: str, artifact: Model) -> None:
    with pytest.raises(UsageError, match=message):
        artifact.generate("Hello", **wrong)
    with pytest.raises(UsageError, match=message):  # at once, not when the first piece is asked for
        artifact.stream("Hello", **wrong)


@pytest.mark.parametrize(
    "messages", [[], ["Hi"], [{"role": "user"}], [{"content": "Hi"}], [{"role": "user", "content": 3}]]
)
def test_what_is_no_conversation_is_an_error(messages: Any, instruct: Model) -> None:
    with pytest.raises(GemmaAwqError, match="The conversation"):
        instruct.chat(messages)


def test_messages_need_an_instruct_model(artifact: Model) -> None:
    with pytest.raises(UsageError, match="Messages need a model with a chat template"):
        artifact.chat([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"device": "gpu"}, "Invalid device: 'gpu'"),
        ({"dtype": "float8"}, "Invalid dtype: 'float8'"),
        ({"quantization": "fp8"}, "Invalid quantization: 'fp8'"),
        ({"attention": "fast"}, "Invalid attention: 'fast'"),
        ({"head": "2bit"}, "Invalid head: '2bit'"),
        ({"dtype": torch.float32}, "is a 4-bit artifact"),
        ({"revision": "main"}, "--revision only applies to a hub id"),
    ],
)
def test_options_that_make_no_sense_are_errors(
    wrong: dict[str, Any], message: str, artifacts: Callable[[str], Path]
) -> None:
    with pytest.raises(UsageError, match=message):
        load_model(artifacts("gemma"), **{"device": "cpu", **wrong})


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(GemmaAwqError, match=r"nowhere' is neither a folder nor a hub id"):
        load_model(tmp_path / "nowhere")


def test_events_tell_what_the_command_says(tmp_path: Path, artifacts: Callable[[str], Path]) -> None:
    events: list[Event] = []
    load_model(str(artifacts("gemma")), device="cpu", on_event=events.append)
    (opened,) = [event for event in events if isinstance(event, ModelOpened)]
    assert opened.device == "cpu"
    assert opened.kernels
    folder = make_checkpoint(tmp_path / "wide", "gemma3_text")
    load_model(folder, device="cpu", dtype=torch.float16, on_event=events.append)
    assert "in float16" in next(event.text for event in events if isinstance(event, Warned))


def test_the_command_offers_the_values_that_the_api_takes() -> None:
    enums = {
        "dtype": options.ComputeDtype, "quantization": options.Quantization, "attention": options.Attention,
        "head": options.Head, "engine": options.EngineName, "kv_cache": options.KvCache,
    }  # fmt: skip
    for name, choices in CHOICES.items():
        assert sorted(choices) == sorted(member.value for member in enums[name])
