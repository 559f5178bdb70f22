"""Tools and schemas over HTTP: what a scripted model writes becomes calls; what a model is forced to write is valid."""

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from gemma_awq_cli.models.text.thoughts import TurnDetokenizer
from gemma_awq_cli.models.text.tool_calls import (
    FUNCTION_GEMMA,
    GEMMA4,
    PROMPTED,
    ToolCall,
    format_of,
    read_call,
    read_calls,
    with_named_results,
)
from tests import samples
from tests.serve.conftest import Json, Serve, Served
from tests.tiny import GEMMA4_SPECIAL, make_checkpoint, make_tokenizer

pytest.importorskip("uvicorn")
pytest.importorskip("llguidance")

MARKS = ["<|tool_call>", "<tool_call|>", '<|"|>', "<|tool_response>", "<tool_response|>"]
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Köln", "東京"]},
        "days": {"type": "integer", "minimum": -(10**18), "maximum": 10**18},
        "exact": {"type": "boolean"},
        "note": {"type": "string", "minLength": 1, "maxLength": 4},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 2}, "minItems": 1, "maxItems": 2},
        "where": {"type": "object", "properties": {"x": {"type": "number"}, "y": {"type": ["null", "boolean"]}},
                  "required": ["x", "y"], "additionalProperties": False},
    },
    "required": ["city", "exact", "tags", "where"],
    "additionalProperties": False,
}  # fmt: skip
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "Of a day", "parameters": PARAMETERS}}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
STOP = {"type": "function", "function": {"name": "stop"}}
TOOLS = [WEATHER, STOP]
CALL = (
    '<|tool_call>call:get_weather{city:<|"|>Köln<|"|>,days:3,where:{x:-1.5,y:null},tags:[<|"|>a,{"b<|"|>]}<tool_call|>'
)
ARGUMENTS = {"city": "Köln", "days": 3, "where": {"x": -1.5, "y": None}, "tags": ['a,{"b']}


@pytest.fixture(scope="module")
def tool_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_checkpoint(tmp_path_factory.mktemp("tools") / "gemma-4-tiny-it", "gemma4_text", chat=True)
    make_tokenizer(folder, True, [*GEMMA4_SPECIAL, *MARKS])
    template = (Path(__file__).parent / "tool_template.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


def with_room(folder: Path) -> Path:
    """The tokenizer has a token for each byte: tools take thousands."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    return folder


@pytest.fixture(scope="module")
def caller(serve: Serve, tool_folder: Path) -> Served:
    return serve(with_room(tool_folder), max_context=2000, max_memory=10**8)


@pytest.fixture(scope="module")
def prompted(serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = make_checkpoint(tmp_path_factory.mktemp("prompted") / "gemma-3-tiny-it", "gemma3_text", chat=True)
    return serve(with_room(folder), max_context=3000, max_memory=10**8)


Script = Callable[[Served, str], None]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """Makes the model write a text, again and again."""

    def write(served: Served, text: str) -> None:
        tokens = served.service.prompter.tokenizer.encode(text)
        place = {"at": 0}

        def draw(*_: Any) -> int:
            place["at"] += 1
            return int(tokens[(place["at"] - 1) % len(tokens)])

        monkeypatch.setattr("gemma_awq_cli.generate.sampler.Sampler._draw", draw)

    return write


def called(message: Json) -> list[tuple[str, Json]]:
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in message["tool_calls"]]


def test_calls_are_apart_from_the_text(caller: Served, script: Script) -> None:
    script(caller, f"So: {CALL}<|tool_call>call:stop{{}}<tool_call|><|tool_response>")
    choice = caller.chat(tools=TOOLS).json["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "So: "
    assert called(choice["message"]) == [("get_weather", ARGUMENTS), ("stop", {})]
    assert len({call["id"] for call in choice["message"]["tool_calls"]}) == 2


def test_calls_in_a_stream(caller: Served, script: Script) -> None:
    script(caller, f"{CALL}Well<|tool_call>call:stop{{}}<tool_call|><turn|>")
    events = caller.chat(tools=TOOLS, stream=True).events
    deltas = [event["choices"][0]["delta"] for event in events]
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert [call["index"] for call in calls] == [0, 1]
    assert json.loads(calls[0]["function"]["arguments"]) == ARGUMENTS
    assert "".join(delta.get("content", "") for delta in deltas) == "Well"
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_without_its_end_is_text(stream: bool, caller: Served, script: Script) -> None:
    script(caller, '<|tool_call>call:get_weather{city:<|"|>' + "o" * 500)
    reply = caller.chat(tools=TOOLS, max_tokens=60, stream=stream)
    choices = [event["choices"][0] for event in reply.events] if stream else [reply.json["choices"][0]]
    text = "".join(choice["delta"].get("content", "") if stream else choice["message"]["content"] for choice in choices)
    assert text.startswith('<|tool_call>call:get_weather{city:<|"|>ooo')
    assert choices[-1]["finish_reason"] == "length"
    assert not any("tool_calls" in choice.get("message", choice.get("delta")) for choice in choices)


def test_a_call_that_is_none_is_text(caller: Served, script: Script) -> None:
    script(caller, "<|tool_call>call:get weather(1)<tool_call|>Hm<turn|>")
    message = caller.chat(tools=TOOLS).json["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "<|tool_call>call:get weather(1)<tool_call|>Hm"}


@pytest.mark.parametrize("stream", [False, True])
def test_one_call_at_a_time(stream: bool, caller: Served, prompted: Served, script: Script) -> None:
    """Answers with more calls end after the first, unless they may be parallel."""
    call = '{"name": "stop", "parameters": {}}'
    for served, text in (
        (caller, f"{CALL}<|tool_call>call:stop{{}}<tool_call|><|tool_response>"),
        (prompted, f"[{call}, {call}]<end_of_turn>"),
    ):
        for parallel in (False, True, None):
            script(served, text)
            reply = served.chat(tools=TOOLS, parallel_tool_calls=parallel, stream=stream)
            choices = [event["choices"][0] for event in reply.events] if stream else [reply.json["choices"][0]]
            parts = [choice["delta" if stream else "message"] for choice in choices]
            assert sum(len(part.get("tool_calls", [])) for part in parts) == (1 if parallel is False else 2)
            assert choices[-1]["finish_reason"] == "tool_calls"


def test_without_tools_nothing_is_called(caller: Served, script: Script) -> None:
    script(caller, "[1]<turn|>")
    for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        choice = caller.chat(**fields).json["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("[1]", "stop")


def test_results_go_through_the_template(caller: Served, script: Script) -> None:
    seen: list[str] = []
    prompter = caller.service.prompter
    encode = prompter.prompt_ids
    object.__setattr__(prompter, "prompt_ids", lambda text: seen.append(text) or encode(text))
    script(caller, "Fine.<turn|>")
    past = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": json.dumps(ARGUMENTS)}}
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [past]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    try:
        reply = caller.send("POST", "/v1/chat/completions", {"messages": messages, "tools": TOOLS})
    finally:
        object.__setattr__(prompter, "prompt_ids", encode)
    assert reply.json["choices"][0]["message"]["content"] == "Fine."
    assert "<|tool>declaration:get_weather{" in seen[0]
    assert CALL.replace("days:3,where:{x:-1.5,y:null},tags", "days:3,tags")[:40] in seen[0]
    assert seen[0].endswith('<|tool_response>response:get_weather{value:<|"|>sunny<|"|>}<tool_response|>')


@pytest.mark.slow
@pytest.mark.parametrize(("model", "choice"), samples.of(
    product(["caller", "prompted"], ["required", NAMED]), [("caller", NAMED), ("prompted", "required")]
), ids=str)  # fmt: skip
def test_a_forced_call_matches_its_schema(model: str, choice: Any, request: pytest.FixtureRequest) -> None:
    served: Served = request.getfixturevalue(model)
    tools = [WEATHER] if choice == "required" else TOOLS
    found = 0
    for seed in range(3):
        reply = served.chat(tools=tools, tool_choice=choice, temperature=2.0, seed=seed, max_tokens=600).json
        answer = reply["choices"][0]
        if answer["finish_reason"] == "length":
            continue
        ((name, arguments),) = called(answer["message"])
        assert (name, answer["finish_reason"], answer["message"]["content"]) == ("get_weather", "tool_calls", None)
        jsonschema.validate(arguments, PARAMETERS)
        found += 1
    assert found


def test_a_prompted_model_is_told_of_tools_and_results(prompted: Served, script: Script) -> None:
    tokenizer = prompted.service.prompter.tokenizer
    script(prompted, '```json\n{"name": "stop", "parameters": {}}\n```<end_of_turn>')
    answer = prompted.chat(tools=TOOLS, stream=True).events
    deltas = [event["choices"][0]["delta"] for event in answer]
    assert [call["function"]["name"] for delta in deltas for call in delta.get("tool_calls", [])] == ["stop"]
    assert "".join(delta.get("content", "") for delta in deltas) == ""
    script(prompted, "[Not a call<end_of_turn>")
    assert prompted.chat(tools=TOOLS).json["choices"][0]["message"]["content"] == "[Not a call"
    past = {"id": "c1", "function": {"name": "stop", "arguments": ""}}
    messages = [
        {"role": "system", "content": "Brief."}, {"role": "user", "content": "Stop!"},
        {"role": "assistant", "tool_calls": [past]}, {"role": "tool", "tool_call_id": "c1", "content": "done"},
        {"role": "user", "content": "Sure?"},
    ]  # fmt: skip
    from gemma_awq_cli.serve.protocol import read_chat

    asked = read_chat(json.dumps({"messages": messages, "tools": TOOLS}).encode(), 264)
    text = tokenizer.decode(prompted.service._encoded(asked, asked.prompts[0]))
    assert text.startswith("<bos><start_of_turn>user\nBrief.\n\nYou have access to functions.")
    assert '"name": "get_weather"' in text
    assert text.endswith(
        '<start_of_turn>model\n{"name": "stop", "parameters": {}}<end_of_turn>\n'
        "<start_of_turn>user\n```tool_output\ndone\n```\n\nSure?<end_of_turn>\n<start_of_turn>model\n"
    )


USER = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{}]}, "tools[0].type"),
        ({"tools": {}}, "tools"),
        ({"tools": [WEATHER] * 129}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "string"}}}]},
         "tools[0].function.parameters"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
        ({"messages": [*USER, {"role": "tool", "content": "x", "tool_call_id": "c"}]}, "messages[1].tool_call_id"),
        ({"messages": [*USER, {"role": "assistant", "tool_calls": [{"id": "c", "function": {
            "name": "f", "arguments": "[1]"}}]}]}, "messages[1].tool_calls[0].function.arguments"),
        ({"tool_choice": "required", "tools": [{"type": "function", "function": {
            "name": "a", "parameters": {"properties": {"b": {"$ref": "#/$defs/c"}}}}}]}, "tools"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {
            "allOf": [{"type": "string"}, {"type": "null"}]}}}}, "response_format"),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_a_wrong_request_is_named_and_others_go_on(fields: Json, param: str, caller: Served, script: Script) -> None:
    reply = caller.send("POST", "/v1/chat/completions", {"messages": USER, **fields})
    assert reply.status == 400, reply.text
    assert reply.json["error"]["param"] == param
    script(caller, "ok<turn|>")
    assert caller.chat().json["choices"][0]["message"]["content"] == "ok"


def test_schemas_over_http(caller: Served) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["é", 1]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    reply = caller.chat(response_format=form, n=3, temperature=1.5, seed=1, max_tokens=200).json
    ended = [choice for choice in reply["choices"] if choice["finish_reason"] == "stop"]
    assert ended
    for choice in ended:
        jsonschema.validate(json.loads(choice["message"]["content"]), schema)
    cut = caller.chat(response_format=form, max_tokens=2).json["choices"][0]
    assert cut["finish_reason"] == "length"


def test_the_openai_client(caller: Served, script: Script) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{caller.url}/v1", api_key="none", max_retries=0)
    script(caller, f"{CALL}<turn|>")
    model = client.models.list().data[0].id
    asked: Json = {"model": model, "messages": USER, "tools": TOOLS}
    choice = client.chat.completions.create(**asked).choices[0]
    assert json.loads(choice.message.tool_calls[0].function.arguments) == ARGUMENTS
    with client.chat.completions.stream(**asked) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    assert json.loads(final.message.tool_calls[0].function.arguments) == ARGUMENTS
    script(caller, '{"a":1}<turn|>')
    result = {"role": "tool", "tool_call_id": choice.message.tool_calls[0].id, "content": "sunny"}
    history = [*USER, choice.message.model_dump(exclude_none=True), result]
    again = client.chat.completions.create(model=model, messages=history, tools=TOOLS).choices[0]
    assert (again.message.content, again.finish_reason) == ('{"a":1}', "stop")


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("call:f{}", {}),
        ("call:f{a:1,b:-2.5e3,c:true,d:null,e:word}", {"a": 1, "b": -2500.0, "c": True, "d": None, "e": "word"}),
        ('call:f{a:<|"|>x}{:,"<|"|>,<|"|>b c<|"|>:[1,[],{}]}', {"a": 'x}{:,"', "b c": [1, [], {}]}),
        ('call:f{ a : "json" , b:{c:<|"|><|"|>} }', {"a": "json", "b": {"c": ""}}),
        ("call:f{a:1e999}", {"a": "1e999"}),
        ("call:f{a:1", None), ("call:f{a}", None), ("call:f{a:,b:1}", None), ('call:f{a:<|"|>x}', None),
        ("call:f", None), ("call:a b{}", None), ("call:f" + "{a:" * 100, None), ("", None),
    ],
    ids=str,
)  # fmt: skip
def test_reading_a_call(text: str, arguments: Json | None) -> None:
    found = read_call(text, GEMMA4)
    assert (found and json.loads(found.arguments)) == arguments
    other = read_call(text.replace('<|"|>', "<escape>"), FUNCTION_GEMMA)
    assert other == found or (found and found.arguments) != (other and other.arguments) is not None


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('{"name": "f", "parameters": {"a": 1}}', [("f", {"a": 1})]),
        ('```json\n[{"name": "f", "arguments": {}}, {"name": "g"}]\n```', [("f", {}), ("g", {})]),
        ('{"name": "f", "parameters": {}}\n{"name": "g", "parameters": {}}', [("f", {}), ("g", {})]),
        ("[f(a=1, b='x'), m.g()]", [("f", {"a": 1, "b": "x"}), ("m.g", {})]),
        ("```tool_code\nf(a=[1, {'b': None}])\n```", [("f", {"a": [1, {"b": None}]})]),
        ("[1, 2]", []), ("[]", []), ('{"a": 1}', []), ("f(x)", []), ("f(a=open('x'))", []), ("[f(a=1e999)]", []),
        ('Sure: {"name": "f"}', []), ("", []), ("[" * 5000, []), ("f(**{'a': 1})", []),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_reading_calls_in_text(text: str, calls: list[tuple[str, Json]]) -> None:
    assert [(call.name, json.loads(call.arguments)) for call in read_calls(text)] == calls


def test_formats_are_known_by_their_template() -> None:
    assert format_of("{% if tools %}<|tool_call>call:") == GEMMA4
    assert format_of("{% for t in tools %}<start_function_call>") == FUNCTION_GEMMA
    assert format_of("<start_of_turn>") == PROMPTED


def test_function_gemmas_results() -> None:
    result = {"role": "tool", "name": "f", "tool_call_id": "c"}
    texts = ['{"a": 1}', "[1]", "sunny", '"x"', "{"]
    found = with_named_results([*USER, *({**result, "content": text} for text in texts)])
    assert found[0] == USER[0]
    assert [message["content"][0]["response"] for message in found[1:]] == [
        {"a": 1}, {"value": [1]}, {"value": "sunny"}, {"value": "x"}, {"value": "{"},
    ]  # fmt: skip
    assert {message["content"][0]["name"] for message in found[1:]} == {"f"}


def test_function_gemmas_tokens(tmp_path: Path) -> None:
    """Its marks need not be special tokens."""
    from gemma_awq_cli.models.text.tokenizer import load_tokenizer

    marks = [FUNCTION_GEMMA.opens, FUNCTION_GEMMA.closes, FUNCTION_GEMMA.quote]
    make_tokenizer(tmp_path, special=["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", *marks])
    tokenizer = load_tokenizer(tmp_path)
    texts: list[str] = []
    turn = TurnDetokenizer(tokenizer, (), texts.append, texts.append, FUNCTION_GEMMA)
    for token in tokenizer.encode("Hi<start_function_call>call:f{a:<escape>ü<escape>}<end_function_call>"):
        turn.add(token)
    assert turn.finish() == ("Hi", "")
    assert turn.calls == [ToolCall("f", '{"a": "ü"}')]
