"""Answers that must match a schema or a grammar: always valid, and every valid token is allowed."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.generate.constraints import GrammarCompiler
from gemma_awq_cli.generate.finding import find_model
from gemma_awq_cli.generate.generation import Engine, GenerationOptions
from gemma_awq_cli.generate.grammar import Grammar, GrammarError, lark_grammar, read_grammar, schema_grammar
from gemma_awq_cli.generate.opening import open_engine, read_checkpoint
from gemma_awq_cli.generate.request import EngineOptions
from gemma_awq_cli.generate.sampling import Sampling
from tests.tiny import VOCAB, make_checkpoint

pytest.importorskip("llguidance")

Json = Any
COLOURS = {"enum": ["red", "green", "größe", "東京", 7, None, True]}
SCHEMAS: dict[str, Json] = {
    "enum": COLOURS,
    "const": {"const": {"a": [1, "\u00e9\n\"\\"]}},
    "integers": {"type": "integer", "minimum": -20, "maximum": 150, "multipleOf": 5},
    "numbers": {"type": "number", "exclusiveMinimum": 0, "maximum": 2.5},
    "lengths": {"type": "string", "minLength": 2, "maxLength": 5},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}(x|yz)$"},
    "date": {"type": "string", "format": "date"},
    "uuid": {"type": "string", "format": "uuid"},
    "nullable": {"type": ["null", "boolean"]},
    "array": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    "tuple": {"type": "array", "prefixItems": [{"const": 1}, COLOURS], "items": False, "minItems": 2},
    "nested": {
        "type": "object",
        "properties": {
            "who": {"type": "object", "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 9}},
                    "required": ["age"], "additionalProperties": False},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 2}, "maxItems": 2},
        },
        "required": ["who", "tags"],
        "additionalProperties": False,
    },
    "unicode": {
        "type": "object", "properties": {"größe": {"enum": ["klein"]}, "名前": COLOURS}, "required": ["größe", "名前"],
        "additionalProperties": False,
    },
    "any-of": {"anyOf": [{"type": "array", "maxItems": 0}, {"type": "string", "maxLength": 3}, {"type": "null"}]},
    "all-of": {
        "allOf": [{"type": "integer", "minimum": 3}, {"maximum": 8}],
    },
    "refs": {
        "$defs": {"leaf": {"enum": ["x", "y"]}}, "type": "array", "items": {"$ref": "#/$defs/leaf"}, "minItems": 1,
        "maxItems": 3,
    },
    "recursive-object": {
        "type": "object", "properties": {"a": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
        "additionalProperties": False,
    },
    "recursive": {"anyOf": [{"enum": [0, 1, 2, 3]}, {"type": "array", "items": {"$ref": "#"}, "maxItems": 2}]},
    "optional": {
        "type": "object", "properties": {name: {"type": "boolean"} for name in "abc"}, "additionalProperties": False,
    },
    "map": {"type": "object", "patternProperties": {"^[ab]$": {"enum": [1, 2]}}, "additionalProperties": False,
        "maxProperties": 2},
    "anything-short": {"type": "array", "items": {"enum": ["a"]}, "maxItems": 1},
}  # fmt: skip
IMPOSSIBLE: dict[str, Json] = {
    "false": False,
    "types": {"allOf": [{"type": "string"}, {"type": "integer"}]},
    "bounds": {"type": "integer", "minimum": 5, "maximum": 3},
    "pattern": {"type": "string", "pattern": "^a{10}$", "maxLength": 3},
    "required": {"type": "object", "properties": {"a": False}, "required": ["a"]},
    "itself": {"$ref": "#"},
    "endless": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    "endless-array": {"type": "array", "items": {"anyOf": [{"$ref": "#"}, {"$ref": "#/items"}]}, "minItems": 1},
    "endless-in-turns": {
        "$defs": {
            name: {"type": "object", "properties": {"x": {"$ref": f"#/$defs/{other}"}}, "required": ["x"]}
            for name, other in ("ab", "ba")
        },
        "allOf": [{"$ref": "#/$defs/a"}],
    },
    "missing": {"$ref": "#/$defs/none"},
    "remote": {"$ref": "http://127.0.0.1:9/schema.json"},
    "unknown-type": {"type": "frob"},
    "unsupported": {"not": {"type": "string"}},
    "many": {"type": "object", "properties": {f"p{index}": {"type": "string"} for index in range(900)}},
    "huge": {"type": "object", "properties": {f"p{index}": {"type": "string"} for index in range(5000)}},
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = make_checkpoint(tmp_path_factory.mktemp("constrained") / "tiny", "gemma4_text", chat=True)
    found = find_model(str(folder), None, lambda _: None)
    checkpoint = read_checkpoint(found, lambda _: None)
    options = EngineOptions(device="cpu", dtype="float32")
    return open_engine(checkpoint, found, options, 4, None, lambda _: None)


def answers(engine: Engine, grammar: Grammar, seeds: int = 6, limit: int = 150) -> list[str]:
    """Answers that ended by themselves, of hot sampling, so that they differ."""
    ids = engine.prompter.prompt_ids("Go")[:8]
    rows = engine.complete([ids] * seeds, GenerationOptions(limit, Sampling(temperature=3.0, seed=5), grammar=grammar))
    return [row.text for row in rows if row.finish == "stop"]


@pytest.mark.parametrize("name", SCHEMAS)
def test_answers_match_their_schema(name: str, engine: Engine) -> None:
    schema = SCHEMAS[name]
    found = answers(engine, schema_grammar(schema))
    assert found, "no answer came to its end"
    for text in found:
        jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())


def test_greedy_answers_match_too(engine: Engine) -> None:
    (row,) = engine.complete(
        [engine.prompter.prompt_ids("Go")[:8]], GenerationOptions(150, grammar=schema_grammar(SCHEMAS["unicode"]))
    )
    assert row.finish == "stop"
    jsonschema.validate(json.loads(row.text), SCHEMAS["unicode"])


def test_an_answer_that_is_cut_says_so(engine: Engine) -> None:
    options = GenerationOptions(5, grammar=schema_grammar(SCHEMAS["nested"]))
    (row,) = engine.complete([engine.prompter.prompt_ids("Go")[:8]], options)
    assert (row.finish, len(row.tokens)) == ("length", 5)


def test_lark_and_regular_expressions(engine: Engine) -> None:
    grammar = lark_grammar('start: "yes" | "no" | NUMBER\nNUMBER: /-?[0-9]{1,3}/')
    found = answers(engine, grammar, seeds=8)
    assert found
    assert all(text in ("yes", "no") or -1000 < int(text) < 1000 for text in found)


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_a_schema_that_cannot_be_met_is_an_error(name: str, engine: Engine) -> None:
    with pytest.raises(GrammarError, match="schema"):
        answers(engine, schema_grammar(IMPOSSIBLE[name]))


@pytest.mark.parametrize("text", ["", "start: other", "start: /(/", "start: start", "x" * 300_000], ids=range(5))
def test_a_wrong_grammar_is_an_error(text: str, engine: Engine) -> None:
    with pytest.raises(GrammarError):
        answers(engine, lark_grammar(text))


def test_strict_alone_refuses_what_cannot_be_enforced(engine: Engine) -> None:
    schema = {"type": "array", "items": {"type": "boolean"}, "uniqueItems": True, "minItems": 1, "maxItems": 2}
    with pytest.raises(GrammarError, match="uniqueItems"):
        answers(engine, schema_grammar(schema))
    assert answers(engine, schema_grammar(schema, strict=False))


def allowed_by_search(words: list[str], before: bytes, names: list[bytes], ends: set[int]) -> set[int]:
    """The tokens after which one of the words can still come, by trying all of them."""
    wanted = [word.encode() for word in words]
    found = {
        token for token, name in enumerate(names)
        if name and token not in ends and any(word.startswith(before + name) for word in wanted)
    }  # fmt: skip
    return found | (ends if before in wanted else set())


def test_the_mask_is_what_a_search_finds(engine: Engine) -> None:
    """With a vocabulary of bytes: at every step of words in several scripts, no token more and none less."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokenizer, ends = engine.prompter.tokenizer, set(engine.ends)
    words = ["größe", "grün", "gr", "東京", "東", 'a"b', "\n"]
    grammar = lark_grammar("start: " + " | ".join(json.dumps(word, ensure_ascii=False) for word in words))
    compiled = GrammarCompiler(tokenizer, VOCAB, ends).compile(grammar)
    table = {character: bytes([byte]) for byte, character in bytes_to_unicode().items()}
    names = [table.get(tokenizer.token_of(token) or "", b"") for token in range(VOCAB)]
    for word in words:
        constraint, before = compiled.constraint(), b""
        for step in [*word.encode(), None]:
            masked = constraint.mask(np.arange(VOCAB, dtype=np.float32))
            allowed = set(np.flatnonzero(np.isfinite(masked)).tolist())
            assert allowed == allowed_by_search(words, before, names, ends), (word, before)
            assert all(masked[token] == token for token in allowed)  # the logits themselves
            if step is not None:
                token = next(index for index in allowed if names[index] == bytes([step]))
                constraint.take(token)
                before += bytes([step])


def test_thoughts_are_free_and_the_answer_is_not(engine: Engine) -> None:
    tokenizer = engine.prompter.tokenizer
    opens, closes = tokenizer.id_of("<|channel>"), tokenizer.id_of("<channel|>")
    assert opens is not None
    assert closes is not None
    grammar = schema_grammar({"enum": [1, 2]}, thinks=True)
    constraint = GrammarCompiler(tokenizer, VOCAB, engine.ends).compile(grammar).constraint()
    one, two = (tokenizer.encode(text)[0] for text in "12")

    def allowed() -> set[int]:
        return set(np.flatnonzero(np.isfinite(constraint.mask(np.zeros(VOCAB, np.float32)))).tolist())

    assert {one, two, opens} <= allowed()
    constraint.take(opens)
    assert len(allowed()) == VOCAB
    for token in (*tokenizer.encode("thought\n9 {"), closes):
        constraint.take(token)
    assert {one, two, opens} <= allowed()
    assert tokenizer.encode("9")[0] not in allowed()
    constraint.take(two)
    assert allowed() == set(engine.ends)


def test_files(tmp_path: Path) -> None:
    schema, lark = tmp_path / "schema.json", tmp_path / "grammar.lark"
    schema.write_bytes(b'\xef\xbb\xbf{"type": "integer"}')
    lark.write_bytes(b"start: \xff")
    assert read_grammar(schema, None, thinks=True) == schema_grammar({"type": "integer"}, thinks=True)
    assert read_grammar(None, None, thinks=False) is None
    with pytest.raises(UsageError, match="exclude"):
        read_grammar(schema, lark, thinks=False)
    with pytest.raises(GemmaAwqError, match="UTF-8 at byte 7"):
        read_grammar(None, lark, thinks=False)
    schema.write_text("[1")
    with pytest.raises(GemmaAwqError, match="not valid JSON"):
        read_grammar(schema, None, thinks=False)
