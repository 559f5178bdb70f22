"""Forced tool calls: the grammar of one call, of a tool's name and arguments that match its schema."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gemma_awq_cli.generate.grammar import ANY_OBJECT, Grammar, GrammarError, lark_grammar, schema_grammar
from gemma_awq_cli.models.text.tokenizer import Tokenizer
from gemma_awq_cli.models.text.tool_calls import ToolFormat

_KEY = re.compile(r"[^\s:,{}\[\]\"<>]{1,200}")
_MOST_CHARACTERS = 100_000
_DIGITS = "[0-9]{0,17}"
_INTEGER = rf"-?(0|[1-9]{_DIGITS})"
_COMMON = f"""
ANY_TEXT: /(?s:.{{0,{_MOST_CHARACTERS}}})/
INTEGER: /{_INTEGER}/
NUMBER: /{_INTEGER}(\\.[0-9]{{1,17}})?([eE][+-]?[0-9]{{1,2}})?/
WORD: /[A-Za-z_][A-Za-z0-9_]{{0,63}}/
any: text | NUMBER | "true" | "false" | "null" | any_list | any_object
any_list: "[" "]" | "[" any ("," any)* "]"
any_object: "{{" "}}" | "{{" WORD ":" any ("," WORD ":" any)* "}}"
"""


def forced_call(tools: Sequence[Mapping[str, Any]], form: ToolFormat, tokenizer: Tokenizer, thinks: bool) -> Grammar:
    """Return the grammar of exactly one call of one of the tools.

    A tool's schema is followed as far as the format allows: for Gemma 4 and FunctionGemma the types, names, enums and
    lengths; in JSON all that llguidance knows. Raises GrammarError for a schema that cannot be followed.
    """
    functions = [tool["function"] for tool in tools]
    if form.prompted:
        calls = [
            {
                "type": "object", "required": ["name", "parameters"], "additionalProperties": False,
                "properties": {"name": {"const": function["name"]}, "parameters": _parameters(function)},
            }
            for function in functions
        ]  # fmt: skip
        definitions: dict[str, Any] = {}
        for function in functions:  # pointers begin at the root
            for name in ("$defs", "definitions"):
                definitions.setdefault(name, {}).update(_parameters(function).get(name, {}))
        whole = {"anyOf": calls, **{name: defined for name, defined in definitions.items() if defined}}
        return schema_grammar(whole, strict=all(bool(function.get("strict")) for function in functions), thinks=thinks)
    opens, closes, quote = (tokenizer.id_of(mark) for mark in (form.opens, form.closes, form.quote))
    if opens is None or closes is None or quote is None:
        raise GrammarError(f"The tokenizer lacks {form.opens}, {form.closes} or {form.quote}.")
    rules = [_COMMON, f"text: <[{quote}]> ANY_TEXT <[{quote}]>"]
    calls_of = []
    for index, function in enumerate(functions):
        arguments = _Arguments(_parameters(function), f"f{index}", quote, rules)
        calls_of.append(f"{json.dumps('call:' + function['name'])} {arguments.root()}")
    start = f"start: <[{opens}]> ({' | '.join(calls_of)}) <[{closes}]>"
    return lark_grammar("\n".join([start, *rules]), thinks)


def _parameters(function: Mapping[str, Any]) -> dict[str, Any]:
    return dict(function.get("parameters") or ANY_OBJECT)


class _Arguments:
    """Writes the rules of one tool's arguments. prefix: of their names; rules: to which they are added."""

    def __init__(self, schema: Mapping[str, Any], prefix: str, quote: int, rules: list[str]) -> None:
        self._schema, self._prefix, self._quote, self._rules = schema, prefix, quote, rules
        self._count = 0
        self._named: dict[str, str] = {}  # JSON pointer -> rule

    def root(self) -> str:
        """The expression of the arguments: an object, whatever the schema leaves open."""
        return self._object(self._schema)

    def _rule(self, body: str, name: str | None = None) -> str:
        name = name or self._new()
        self._rules.append(f"{name}: {body}")
        return name

    def _new(self) -> str:
        self._count += 1
        return f"{self._prefix}_{self._count}"

    def _value(self, schema: Any) -> str:
        if not isinstance(schema, Mapping) or not schema:
            return "any"
        if isinstance(pointer := schema.get("$ref"), str):
            return self._referred(pointer)
        if "const" in schema:
            return self._literal(schema["const"])
        if isinstance(values := schema.get("enum"), list) and values:
            return self._either([self._literal(value) for value in values])
        for name in ("anyOf", "oneOf"):
            if isinstance(schemas := schema.get(name), list) and schemas:
                return self._either([self._value(each) for each in schemas])
        kinds = schema.get("type", "object" if "properties" in schema else None)
        if kinds is None:
            return "any"
        kinds = list(kinds) if isinstance(kinds, list) else [kinds]
        if schema.get("nullable") is True:
            kinds.append("null")
        return self._either([self._typed(str(kind).lower(), schema) for kind in kinds])

    def _typed(self, kind: str, schema: Mapping[str, Any]) -> str:
        simple = {"integer": "INTEGER", "number": "NUMBER", "boolean": '("true" | "false")', "null": '"null"'}
        if kind == "string":
            least, most = (schema.get(name) for name in ("minLength", "maxLength"))
            if least is None and most is None:
                return "text"
            bounds = f"{_bound(least, 0)},{_bound(most, _MOST_CHARACTERS)}"
            name = self._new().upper()
            self._rule(f"/(?s:.{{{bounds}}})/", name)
            return f"<[{self._quote}]> {name} <[{self._quote}]>"
        if kind == "array":
            item = self._rule(self._value(schema.get("items")))
            least = _bound(schema.get("minItems"), 0)
            most = schema.get("maxItems")
            more = f"{{{max(least - 1, 0)},{'' if most is None else max(_bound(most, 0) - 1, 0)}}}"
            some = f'"[" {item} ("," {item}){more} "]"'
            if most == 0:
                return '"[" "]"'
            return self._rule(some if least else f'"[" "]" | {some}')
        if kind == "object":
            return self._object(schema)
        if kind not in simple:
            raise GrammarError(f"Invalid type in a tool's parameters: {kind[:80]!r}.")
        return simple[kind]

    def _object(self, schema: Mapping[str, Any]) -> str:
        properties = schema.get("properties")
        if not isinstance(properties, Mapping) or not properties:
            return "any_object" if schema.get("additionalProperties") is not False else '"{" "}"'
        required = schema.get("required") or []
        names = sorted(properties)  # the order in which the models' templates write them
        # after[first]: what may follow, if nothing or if something stands before it
        after = {True: '""', False: '""'}
        for name in reversed(names):
            if not _KEY.fullmatch(name):
                raise GrammarError(f"A tool's parameter cannot be called {name[:80]!r}.")
            value = self._rule(self._value(properties[name]))
            after = {
                first: self._rule(
                    f"{json.dumps(('' if first else ',') + name + ':')} {value} {after[False]}"
                    + ("" if name in required else f" | {after[first]}")
                )
                for first in (True, False)
            }
        return f'"{{" {after[True]} "}}"'

    def _referred(self, pointer: str) -> str:
        if pointer not in self._named:
            found: Any = self._schema
            for step in pointer.removeprefix("#").split("/")[1:]:
                found = found.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
            if not pointer.startswith("#") or found is None:
                raise GrammarError(f"A tool's parameters refer to {pointer[:80]!r}, which is not there.")
            self._named[pointer] = name = self._new()  # first: it may refer to itself
            self._rule(self._value(found), name)
        return self._named[pointer]

    def _literal(self, value: Any) -> str:
        if isinstance(value, str):
            return f"<[{self._quote}]> {json.dumps(value, ensure_ascii=False)} <[{self._quote}]>"
        if isinstance(value, Mapping):
            items = ' "," '.join(f"{json.dumps(key + ':')} {self._literal(item)}" for key, item in value.items())
            return f'"{{" {items} "}}"'
        if isinstance(value, list):
            return self._list(value)
        return json.dumps(json.dumps(value))

    def _list(self, values: list[Any]) -> str:
        items = ' "," '.join(map(self._literal, values))
        return f'"[" {items} "]"'

    def _either(self, choices: list[str]) -> str:
        return choices[0] if len(choices) == 1 else f"({' | '.join(choices)})"


def _bound(value: Any, default: int) -> int:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise GrammarError(f"Invalid length in a tool's parameters: {str(value)[:80]}.")
    return min(value, _MOST_CHARACTERS)
