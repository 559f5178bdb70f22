"""Forced calls, drawn at random: each is read as one call, of a tool that exists, whose arguments match its schema."""

import json
from typing import Any

import jsonschema
import pytest
import torch

from gemma_awq_cli.generate.grammar import GrammarError
from gemma_awq_cli.generate.tool_choice import forced_call
from gemma_awq_cli.models.text.thoughts import TurnDetokenizer
from gemma_awq_cli.models.text.tokenizer import Tokenizer, load_tokenizer
from gemma_awq_cli.models.text.tool_calls import FUNCTION_GEMMA, GEMMA4, PROMPTED, ToolFormat
from tests.tiny import GEMMA4_SPECIAL, make_tokenizer

pytest.importorskip("llguidance")
from gemma_awq_cli.generate.constraints import GrammarCompiler

FORMS = {"gemma4": GEMMA4, "functiongemma": FUNCTION_GEMMA, "json": PROMPTED}
TREE = {"type": "object", "properties": {"v": {"type": "integer", "minimum": 0, "maximum": 9},
                                         "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/tree"}]}},
        "required": ["v", "next"], "additionalProperties": False}  # fmt: skip
SCHEMAS: dict[str, dict[str, Any]] = {
    "integers": {"a": {"type": "integer", "minimum": -3, "maximum": 117},
                 "b": {"type": "integer", "exclusiveMinimum": 5},
                 "c": {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 70}},
    "numbers": {"a": {"type": "number", "minimum": 0, "exclusiveMaximum": 1}, "b": {"type": ["number", "null"]}},
    "patterns": {"a": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
                 "b": {"type": "string", "pattern": "[0-9]"},
                 "c": {"type": "string", "pattern": "^(cat|dog)s?", "maxLength": 6}},
    "formats": {name: {"type": "string", "format": form} for name, form in (
        ("a", "date"), ("b", "time"), ("c", "date-time"), ("d", "ipv4"), ("e", "uuid"), ("f", "email"))},
    "lengths": {"a": {"type": "string", "minLength": 2, "maxLength": 3}, "b": {"type": "string", "maxLength": 0}},
    "enums": {"a": {"enum": ["ü\n", 3, None, True, [1, "x"], {"k": "v"}]}, "b": {"const": "1"},
              "c": {"type": "string", "enum": ["on", 5]}},
    "arrays": {"a": {"type": "array", "minItems": 2, "maxItems": 3, "items": {"type": "array", "items":
                     {"type": "integer", "minimum": 1, "maximum": 4}, "maxItems": 2}},
               "b": {"type": "array", "items": {"type": "object", "properties": {"x": {"type": "boolean"}},
                     "required": ["x"], "additionalProperties": False}, "minItems": 1, "maxItems": 1}},
    "maps": {"a": {"type": "object", "additionalProperties": {"type": "integer", "maximum": 12}},
             "b": {"type": "object", "required": ["free"], "additionalProperties": {"type": "boolean"}}},
    "references": {"a": {"$ref": "#/$defs/tree"}, "b": {"allOf": [{"$ref": "#/$defs/code"}], "description": "d"},
                   "c": {"oneOf": [{"type": "integer", "minimum": 3, "maximum": 4}, {"type": "null"}]}},
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    marks = [mark for form in (GEMMA4, FUNCTION_GEMMA) for mark in (form.opens, form.closes, form.quote, form.ends)]
    make_tokenizer(folder, True, [*GEMMA4_SPECIAL, *marks])
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, tokenizer.backend.get_vocab_size(), [1])


def tool(properties: dict[str, Any], strict: bool = True, **words: Any) -> dict[str, Any]:
    parameters = {
        "type": "object", "properties": properties, "required": sorted(properties), "additionalProperties": False,
        "$defs": {"tree": TREE, "code": {"type": "string", "pattern": "^[a-c]{2}$"}}, **words,
    }  # fmt: skip
    return {"type": "function", "function": {"name": "t", "strict": strict, "parameters": parameters}}


def draw(compiler: GrammarCompiler, tokenizer: Tokenizer, tools: Any, form: ToolFormat, seed: int) -> list[Any] | None:
    """The calls of a random text that follows the grammar; None if it does not end."""
    constraint = compiler.compile(forced_call(tools, form, tokenizer, False)).constraint()
    generator = torch.Generator().manual_seed(seed)
    size = tokenizer.backend.get_vocab_size()
    likely = torch.zeros(size)
    for text in ('"', "}", "]", form.quote, form.closes):  # or else a text hardly ever ends
        likely[[token for token in tokenizer.encode(text) if token != 2]] = 4.0 if text else 0.0
    turn = TurnDetokenizer(tokenizer, (), lambda _: None, lambda _: None, form)
    for _ in range(1500):
        token = int(constraint.mask(likely + torch.randn(size, generator=generator) * 2).argmax())
        constraint.take(token)
        if token == 1:
            text, _ = turn.finish()
            assert text == ""
            return turn.calls
        turn.add(token)
    return None


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_call_matches_its_schema(
    schema: str, form: ToolFormat, compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    tools = [tool(SCHEMAS[schema])]
    ended = [draw(compiler, tokenizer, tools, form, seed) for seed in range(12)]
    calls = [calls for calls in ended if calls is not None]
    assert len(calls) >= 6
    for (call,) in calls:
        assert call.name == "t"
        jsonschema.validate(
            json.loads(call.arguments),
            tools[0]["function"]["parameters"],
            format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER,
        )


@pytest.mark.parametrize("form", [GEMMA4, FUNCTION_GEMMA], ids=["gemma4", "functiongemma"])
@pytest.mark.parametrize(
    ("properties", "message"),
    [
        ({"a": {"type": "array", "uniqueItems": True}}, "cannot enforce the keyword uniqueItems"),
        ({"a": {"type": "string", "format": "iri"}}, "cannot enforce the format iri"),
        ({"a": {"type": "string", "pattern": "^a|b$"}}, "cannot enforce the pattern"),
        ({"a": {"type": "object", "minProperties": 1}}, "cannot enforce the keyword minProperties"),
        ({"a": {"not": {"type": "null"}}}, "cannot enforce the keyword not"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_strict_tool_that_cannot_be_enforced_is_refused(
    properties: dict[str, Any], message: str, form: ToolFormat, compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    with pytest.raises(GrammarError, match=message):
        forced_call([tool(properties)], form, tokenizer, False)
    compiler.compile(forced_call([tool(properties, strict=False)], form, tokenizer, False))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(
    "properties",
    [
        {"a": {"enum": []}},
        {"a": {"type": "array", "minItems": 3, "maxItems": 2}},
        {"a": {"type": "integer", "minimum": 3, "maximum": 2}},
        {"a": {"type": "object", "properties": {"b": {"$ref": "#/properties/a"}}, "required": ["b"]}},
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_schema_that_nothing_meets_is_an_error(
    properties: dict[str, Any], form: ToolFormat, compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    with pytest.raises(GrammarError):
        compiler.compile(forced_call([tool(properties)], form, tokenizer, False))


@pytest.mark.parametrize("form", [form for form in FORMS.values() if not form.prompted], ids=lambda form: form.opens)
@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#/properties/a", "minLength": 1},
        {"allOf": [{"$ref": "#/properties/a"}]},
        {"anyOf": [{"$ref": "#/properties/a"}, {"type": "string"}], "minLength": 1},
        # each level is written out twice by the one above it
        {"allOf": [{"$ref": "#/$defs/20"}]},
    ],
    ids=["beside", "all_of", "any_of", "doubled"],
)
def test_references_that_never_end_are_an_error(schema: dict[str, Any], form: ToolFormat, tokenizer: Tokenizer) -> None:
    """What may be left out has a finite value, but would be written out without end, or nearly."""
    levels = {
        str(n): {"properties": {key: {"allOf": [{"$ref": f"#/$defs/{n - 1}"}]} for key in "xy"}} for n in range(1, 21)
    }
    made = tool({"a": schema})
    made["function"]["parameters"] |= {"required": [], "$defs": {"0": {}, **levels}}
    with pytest.raises(GrammarError, match="too"):
        forced_call([made], form, tokenizer, False)
