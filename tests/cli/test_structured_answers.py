"""`gemma-awq run` with schemas, grammars and tools."""

import json
from pathlib import Path
from typing import Any

import pytest

from gemma_awq_cli.cli.app import main
from tests.tiny import make_checkpoint

pytest.importorskip("llguidance")

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = make_checkpoint(tmp_path_factory.mktemp("structured") / "tiny-it", "gemma3_text", chat=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    return ["run", "-m", str(folder), "--device", "cpu", "--dtype", "float32", "--max-new-tokens", "60"]


def write(path: Path, value: Any) -> str:
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return str(path)


def test_a_schema_and_a_grammar(run: list[str], tmp_path: Path, capsys: Capture) -> None:
    schema = write(tmp_path / "schema.json", {"enum": ["ü", 12]})
    assert main([*run, "--json-schema", schema, "Go"]) == 0
    assert json.loads(capsys.readouterr().out) in ("ü", 12)
    lark = write(tmp_path / "grammar.lark", "start: /[ab]{3}/")
    assert main([*run, "--grammar", lark, "--json", "Go"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document["text"]) <= {"a", "b"}
    assert (len(document["text"]), document["finish"]) == (3, "stop")


def test_completions_of_a_file_say_their_schema(run: list[str], tmp_path: Path) -> None:
    schema = write(tmp_path / "schema.json", {"enum": [1, 2]})
    output = tmp_path / "out.jsonl"
    files = ["--input", write(tmp_path / "prompts.txt", "a\nb\n"), "--output", str(output)]
    assert main([*run, *files, "--json-schema", schema]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert {row["text"] for row in rows} <= {"1", "2"}
    assert json.loads(rows[0]["made_with"]["json_schema"]) == {"enum": [1, 2]}
    assert main([*run, *files, "--resume"]) == 1  # another run altogether


def test_tools_are_called_and_printed(
    run: list[str], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = write(tmp_path / "tools.json", [{"name": "f", "parameters": {"properties": {"a": {}}}}])
    call = '{"name": "f", "parameters": {"a": [1]}}'
    texts = iter([*call.encode(), None] * 2)

    def draw(sampler: Any, logits: Any, leading: Any) -> int:
        byte = next(texts)
        return 5 if byte is None else letters[byte]

    from gemma_awq_cli.models.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(Path(run[2]))
    letters = {byte: tokenizer.encode(chr(byte))[0] for byte in call.encode()}
    monkeypatch.setattr("gemma_awq_cli.generate.sampler.Sampler._draw", draw)
    assert main([*run, "--tools", tools, "Go"]) == 0
    assert json.loads(capsys.readouterr().out) == {"name": "f", "arguments": {"a": [1]}}
    assert main([*run, "--tools", tools, "--json", "Go"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["tool_calls"] == [{"name": "f", "arguments": {"a": [1]}}]
    assert document["text"] == ""


def test_calls_in_the_completions_of_a_file(
    run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    tools = write(tmp_path / "tools.json", [{"name": "f"}])
    output = tmp_path / "out.jsonl"
    files = ["--input", write(tmp_path / "prompts.txt", "a\n"), "--output", str(output)]
    from gemma_awq_cli.models.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(Path(run[2]))
    call = iter([*(tokenizer.encode(letter)[0] for letter in '{"name": "f", "parameters": {"a": 1}}'), 5])
    monkeypatch.setattr("gemma_awq_cli.generate.sampler.Sampler._draw", lambda *_: next(call))
    assert main([*run, *files, "--tools", tools]) == 0
    (row,) = map(json.loads, output.read_text().splitlines())
    assert (row["text"], row["tool_calls"]) == ("", [{"name": "f", "arguments": {"a": 1}}])
    assert row["made_with"]["tools"][0]["function"]["name"] == "f"
    capsys.readouterr()
    assert main([*run, *files, "--resume"]) == 1  # without the tools it is another run
    assert "tools" in capsys.readouterr().err


def test_images_are_refused(run: list[str], capsys: Capture) -> None:
    assert main([*run, "--image", "photo.png", "What is this?"]) == 2
    assert "--image cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "content", "message"),
    [
        ("--json-schema", "{", "not valid JSON"),
        ("--json-schema", "3", "not a JSON object"),
        ("--json-schema", '{"not": {}}', "not"),
        ("--json-schema", "false", "cannot be used"),
        ("--grammar", "start: missing", "cannot be used"),
        ("--tools", "[]", "not a list of 1 to 128 tools"),
        ("--tools", '[{"name": "a b"}]', "tool 1: function.name"),
        ("--tools", '[{"name": "a", "parameters": {"type": "string"}}]', "tool 1: function.parameters"),
        ("--tools", "[3]", "tool 1: It must be a JSON object"),
    ],
)
def test_wrong_files(option: str, content: str, message: str, run: list[str], tmp_path: Path, capsys: Capture) -> None:
    assert main([*run, option, write(tmp_path / "file", content), "Go"]) != 0
    assert message in " ".join(capsys.readouterr().err.split())


def test_options_that_exclude_each_other(run: list[str], tmp_path: Path, capsys: Capture) -> None:
    schema, lark = write(tmp_path / "s.json", {}), write(tmp_path / "g.lark", "start: /a/")
    tools = write(tmp_path / "t.json", [{"name": "f"}])
    for options in (
        ["--json-schema", schema, "--grammar", lark],
        ["--json-schema", schema, "--tools", tools],
        ["--json-schema", schema, "--engine", "vllm"],
        ["--tools", tools, "--raw"],
    ):
        plain = run[:3] if "vllm" in options else run
        assert main([*plain, *options, "Go"]) == 2, options
