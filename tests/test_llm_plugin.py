"""The plugin for `llm`, run by the real `llm`: what it lists, and that answers are those of the Python API."""

import asyncio
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gemma_awq_cli import Model, load_model
from gemma_awq_cli.models.checkpoints.cache import remember_folder
from tests.tiny import make_checkpoint

llm = pytest.importorskip("llm")
FOLDER = Path(__file__).parent.parent / "llm-gemma-awq"
SETTINGS = {"max_tokens": 6, "device": "cpu"}


@pytest.fixture(scope="module")
def plugin() -> ModuleType:
    spec = importlib.util.spec_from_file_location("llm_gemma_awq", FOLDER / "llm_gemma_awq.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plugin: ModuleType) -> Iterator[Path]:
    """`llm` with the plugin, in an empty folder and with nothing of the user's."""
    folder = tmp_path / "llm"
    folder.mkdir()
    monkeypatch.setenv("LLM_USER_PATH", str(folder))
    monkeypatch.chdir(tmp_path)
    llm.plugins.load_plugins()
    llm.plugins.pm.register(plugin, "gemma-awq")
    yield folder
    llm.plugins.pm.unregister(plugin)


@pytest.fixture
def artifact(artifacts: Callable[[str], Path]) -> Path:
    """A base model, which this tool remembers."""
    folder = artifacts("gemma3_text")
    remember_folder(folder)
    return folder


@pytest.fixture(scope="module")
def instruct_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_checkpoint(tmp_path_factory.mktemp("instruct") / "gemma-3-tiny-it", "gemma3_text", chat=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))  # room for tools
    return folder


@pytest.fixture
def instruct(instruct_folder: Path) -> Any:
    model = llm.get_model("gemma-awq")
    return model, {**SETTINGS, "path": str(instruct_folder)}


@pytest.fixture(scope="module")
def same(instruct_folder: Path) -> Model:
    return load_model(instruct_folder, device="cpu")


Script = Callable[[Sequence[str]], None]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, same: Model) -> Script:
    """Makes the model write texts, each up to the end of its turn."""

    def write(texts: Sequence[str]) -> None:
        tokens = iter(same._engine.prompter.tokenizer.encode("".join(f"{text}<end_of_turn>" for text in texts)))
        monkeypatch.setattr("gemma_awq_cli.generate.sampler.Sampler._draw", lambda *_: int(next(tokens)))

    return write


def test_models_are_the_artifacts_that_are_listed(
    artifact: Path, tmp_path: Path, plugin: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy, copy_function=os.link)
    namesake = tmp_path / "elsewhere" / artifact.name
    shutil.copytree(artifact, namesake, copy_function=os.link)
    remember_folder(namesake)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "quantization_report.json").write_text("{}")
    listed = {model.model_id: getattr(model, "folder", None) for model in llm.get_models()}
    own = {name: folder for name, folder in listed.items() if name.startswith("gemma-awq")}
    assert own == {
        "gemma-awq": "",
        "gemma-awq/copy": str(copy),
        f"gemma-awq/{artifact.name}": str(namesake),  # the one that was written last has the short name
        f"gemma-awq/{artifact}": str(artifact),
    }


def test_answers_are_those_of_the_python_api(artifact: Path) -> None:
    model = llm.get_model(f"gemma-awq/{artifact.name}")
    own = load_model(artifact, device="cpu")
    sampling = {"temperature": 1.0, "seed": 2}
    response = model.prompt("Hello there", **{**SETTINGS, "max_tokens": 40}, **sampling)
    pieces = list(response)
    expected = own.generate("Hello there", max_new_tokens=40, **sampling)
    assert "".join(pieces) == response.text() == expected.text
    assert len(pieces) > 1
    assert response.usage().input == expected.prompt_tokens
    assert response.usage().output == 40
    assert response.response_json["finish"] == "length"
    stop = expected.text[2]
    cut = model.prompt("Hello there", **{**SETTINGS, "max_tokens": 40}, **sampling, stop=[stop])
    assert cut.text() == expected.text.partition(stop)[0]
    assert cut.response_json["finish"] == "stop"
    sampling = {"temperature": 1.5, "top_p": 0.9, "top_k": 40, "min_p": 0.001, "seed": 3, "repetition_penalty": 1.2,
                "presence_penalty": 0.5, "frequency_penalty": 0.5}  # fmt: skip
    sampled = model.prompt("Hello there", **SETTINGS, **sampling).text()
    assert sampled == own.generate("Hello there", max_new_tokens=6, **sampling).text != expected.text
    with pytest.raises(llm.ModelError, match="--system needs a model with a chat template"):
        model.prompt("Hello", system="Be brief.", **SETTINGS).text()


def test_a_conversation_goes_through_the_chat_template(instruct: Any, same: Model) -> None:
    model, settings = instruct
    conversation = model.conversation()
    first = conversation.prompt("Hi", system="Be brief.", **settings).text()
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert first == same.chat(messages, max_new_tokens=6).text
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "More"}]
    expected = same.chat(messages, max_new_tokens=6)
    answer = conversation.prompt("More", **settings)
    assert answer.text() == expected.text
    assert answer.usage().input == expected.prompt_tokens


def test_an_empty_answer_keeps_its_turn(instruct: Any, script: Script, same: Model) -> None:
    """`llm` leaves it out of the messages, and a chat template wants turns that alternate."""
    model, settings = instruct
    conversation = model.conversation()
    script(["", "Yes."])
    sampling = {"temperature": 1.0}
    assert conversation.prompt("Hi", **settings, **sampling).text() == ""
    assert conversation.prompt("Are you there?", **settings, **sampling).text() == "Yes."


def test_a_conversation_continues_from_the_log(artifact: Path, same: Model, instruct: Any) -> None:
    from click.testing import CliRunner
    from llm.cli import cli

    def run(*arguments: str) -> str:
        options = [part for name, value in instruct[1].items() for part in ("-o", name, str(value))]
        done = CliRunner().invoke(cli, [*arguments, *options], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout.removesuffix("\n")

    first = run("-m", "gemma-awq", "Hi")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": first}]
    messages.append({"role": "user", "content": "More"})
    assert run("-c", "More") == same.chat(messages, max_new_tokens=6).text


def test_an_answer_matches_a_schema(instruct: Any) -> None:
    pytest.importorskip("llguidance")
    model, settings = instruct
    assert model.prompt("A dog's age", schema={"enum": [3, 12]}, **settings).text() in ("3", "12")


def test_tools_are_called_and_their_results_read(instruct: Any, script: Script, same: Model) -> None:
    model, settings = instruct
    asked: list[str] = []

    def weather(city: str) -> str:
        """Of a city."""
        asked.append(city)
        return f"Rain in {city}"

    script(['{"name": "weather", "parameters": {"city": "Köln"}}', "It rains."])
    chain = model.chain(
        "Does it rain in Köln?", tools=[weather], options={**settings, "max_tokens": 200, "temperature": 1.0}
    )
    assert chain.text() == "It rains."
    assert asked == ["Köln"]
    call, answer = chain._responses
    assert [(each.name, each.arguments) for each in call.tool_calls()] == [("weather", {"city": "Köln"})]
    tools = [{"type": "function", "function": {
        "name": "weather", "description": "Of a city.",
        "parameters": llm.Tool.function(weather).input_schema,
    }}]  # fmt: skip
    called = {"function": {"name": "weather", "arguments": {"city": "Köln"}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Does it rain in Köln?"},
        {"role": "assistant", "content": "", "tool_calls": [called]},
        {"role": "tool", "content": "Rain in Köln"},
    ]  # fmt: skip
    script(["It rains."])
    assert answer.usage().input == same.chat(messages, max_new_tokens=200, tools=tools, temperature=1.0).prompt_tokens


def test_asyncio_gets_the_same_answers_piece_by_piece(artifact: Path) -> None:
    """Two at once of one model, while the loop goes on."""
    name, settings = f"gemma-awq/{artifact.name}", {"max_tokens": 40, "temperature": 1.0, "seed": 2, "device": "cpu"}
    prompts = ["Hello there", "A word"]
    order: list[str] = []

    async def read(prompt: str) -> str:
        response = llm.get_async_model(name).prompt(prompt, **settings)
        pieces = []
        async for piece in response:
            pieces.append(piece)
            order.append(prompt)
        assert (await response.usage()).output == 40
        assert response.response_json["finish"] == "length"
        return "".join(pieces)

    async def ask() -> list[str]:
        return list(await asyncio.gather(*map(read, prompts)))

    texts = asyncio.run(ask())
    assert texts == [llm.get_model(name).prompt(prompt, **settings).text() for prompt in prompts]
    assert order not in (sorted(order), sorted(order, reverse=True))  # in turns: the loop goes on meanwhile


def test_asyncio_converses_matches_a_schema_and_calls_tools(instruct: Any, script: Script, same: Model) -> None:
    pytest.importorskip("llguidance")
    _, settings = instruct
    model = llm.get_async_model("gemma-awq")
    asked: list[str] = []

    async def weather(city: str) -> str:
        """Of a city."""
        await asyncio.sleep(0)
        asked.append(city)
        return f"Rain in {city}"

    async def talk() -> list[str]:
        conversation = model.conversation()
        return [await conversation.prompt(text, **settings).text() for text in ("Hi", "More")]

    async def matched() -> str:
        return await model.prompt("A dog's age", schema={"enum": [3, 12]}, **settings).text()

    async def called() -> str:
        return await model.chain("Rain in Köln?", tools=[weather], options={**settings, "max_tokens": 200}).text()

    first, second = asyncio.run(talk())
    messages = [{"role": "user", "content": "Hi"}]
    assert first == same.chat(messages, max_new_tokens=6).text
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "More"}]
    assert second == same.chat(messages, max_new_tokens=6).text
    assert asyncio.run(matched()) in ("3", "12")
    script(['{"name": "weather", "parameters": {"city": "Köln"}}', "It rains."])
    assert asyncio.run(called()) == "It rains."
    assert asked == ["Köln"]


def test_asyncio_errors_and_cancelled_answers_leave_the_model_usable(artifact: Path) -> None:
    settings = {"temperature": 1.0, "seed": 2, "device": "cpu"}
    model = llm.get_async_model(f"gemma-awq/{artifact.name}")
    pieces: list[str] = []

    async def failing() -> None:
        await llm.get_async_model("gemma-awq").prompt("Hi", path="./missing").text()

    async def cancelled() -> str:
        async def read() -> None:
            async for piece in model.prompt("Hello there", max_tokens=40, **settings):
                pieces.append(piece)
                asyncio.current_task().cancel()  # while the next piece is made

        with pytest.raises(asyncio.CancelledError):
            await asyncio.create_task(read())
        return await model.prompt("Hello there", max_tokens=40, **settings).text()

    with pytest.raises(llm.ModelError, match=r"neither a folder nor a hub id\. Give a checkpoint folder"):
        asyncio.run(failing())
    text = asyncio.run(cancelled())
    assert len(pieces) == 1
    assert (
        text
        == load_model(artifact, device="cpu").generate("Hello there", max_new_tokens=40, temperature=1, seed=2).text
    )


def test_errors_are_the_message_and_its_hint(instruct: Any, artifact: Path, tmp_path: Path) -> None:
    model, settings = instruct
    with pytest.raises(llm.ModelError, match=r"neither a folder nor a hub id\. Give a checkpoint folder"):
        model.prompt("Hi", **{**settings, "path": "./missing"}).text()
    with pytest.raises(llm.ModelError, match=r"exclude each other\. Give one"):
        model.prompt("Hi", schema={"type": "object"}, tools=[str.upper], **settings).text()
    with pytest.raises(ValueError, match="less than or equal to 1"):
        model.prompt("Hi", top_p=2, **settings)
    history = [llm.user("Hi"), llm.assistant(llm.parts.ToolCallPart(name="f", arguments={})), llm.user("So?")]
    with pytest.raises(llm.ModelError, match="message 3 does not follow"):
        model.prompt(messages=history, **settings).text()


def test_thoughts_come_before_the_text(plugin: ModuleType) -> None:
    thoughts = ["Let me", " see."]
    assert [(event.type, event.chunk) for event in plugin.thought_events(thoughts)] == [("reasoning", "Let me see.")]
    assert list(plugin.thought_events(thoughts)) == []


def test_the_readme_names_every_option(plugin: ModuleType) -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    options = [line.partition("|")[2].partition("|")[0] for line in text.splitlines() if line.startswith("| `")]
    named = {name.strip(" `") for names in options for name in names.split(",")}
    assert named == set(plugin.GemmaAwqAtPath.Options.model_fields)


def test_llm_finds_the_installed_plugin(artifact: Path, tmp_path: Path, user_folder: Path) -> None:
    """Through the entry point that its pyproject.toml declares, without torch at the start of `llm`."""
    site = tmp_path / "site"
    information = site / "llm_gemma_awq-0.1.0.dist-info"
    information.mkdir(parents=True)
    shutil.copy(FOLDER / "llm_gemma_awq.py", site)
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [f"{name} = {module}" for name, module in project["entry-points"]["llm"].items()]
    (information / "entry_points.txt").write_text("\n".join(["[llm]", *lines]) + "\n")
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0.1.0\n")
    name = f"gemma-awq/{artifact.name}"
    options = [part for option, value in SETTINGS.items() for part in ("-o", option, str(value))]
    code = (
        "import sys\nfrom llm.cli import cli\n"
        "cli(['models', 'list'], standalone_mode=False)\n"
        "cli(['-m', *sys.argv[1:], '--no-log'], standalone_mode=False)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, name, "Hello there", "-o", "temperature", "1", "-o", "seed", "2", *options]
    environment = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{FOLDER.parent}"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert {f"GemmaAwq: {name}", "GemmaAwq: gemma-awq"} <= set(lines)
    expected = load_model(artifact, device="cpu").generate("Hello there", max_new_tokens=6, temperature=1, seed=2).text
    assert done.stdout.endswith(f"\n{expected}\n")
    assert expected
