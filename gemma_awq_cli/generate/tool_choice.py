"""Forced tool calls: the grammar of one call, of a tool's name and arguments that match its schema."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gemma_awq_cli.generate.grammar import (
    ANY_OBJECT,
    Grammar,
    GrammarError,
    has_finite_value,
    lark_grammar,
    pointed_at,
    schema_grammar,
)
from gemma_awq_cli.models.text.tokenizer import Tokenizer
from gemma_awq_cli.models.text.tool_calls import ToolFormat

_KEY = re.compile(r"[^\s:,{}\[\]\"<>]{1,200}")
_MOST_CHARACTERS = 100_000
_LEVELS = 4  # of values that a schema leaves open
_MOST_REFERENCES = 1000  # that are followed in one tool's schema
_DIGITS = "[0-9]{0,17}"
_INTEGER = rf"-?(0|[1-9]{_DIGITS})"
_DATE = (
    "[0-9]{4}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-9]))"
)
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_LABEL = "[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_BYTE = "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "duration": "P([0-9]{1,9}W|([0-9]{1,9}D|[0-9]{1,9}M([0-9]{1,9}D)?|[0-9]{1,9}Y([0-9]{1,9}M([0-9]{1,9}D)?)?))",
    "email": rf"[A-Za-z0-9_+-]{{1,32}}(\.[A-Za-z0-9_+-]{{1,32}}){{0,3}}@{_LABEL}(\.{_LABEL}){{1,4}}",
    "hostname": rf"{_LABEL}(\.{_LABEL}){{0,3}}",
    "ipv4": rf"{_BYTE}(\.{_BYTE}){{3}}",
    "uuid": "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "uri": r"[a-z][a-z0-9+.-]{0,20}:[A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=-]{1,2000}",
}
# What says nothing of the values.
_ANNOTATIONS = frozenset({
    "$comment", "$defs", "$id", "$schema", "default", "definitions", "deprecated", "description", "example", "examples",
    "nullable", "readOnly", "title", "writeOnly", "strict",
})  # fmt: skip
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
# The keywords that are enforced, by the type that they are about; of a number by llguidance.
_ENFORCED: dict[str, frozenset[str]] = {
    "string": frozenset({"minLength", "maxLength", "pattern", "format"}),
    "integer": frozenset(_BOUNDS),
    "number": frozenset(_BOUNDS),
    "array": frozenset({"items", "minItems", "maxItems"}),
    "object": frozenset({"properties", "required", "additionalProperties"}),
    "boolean": frozenset(),
    "null": frozenset(),
}
_OF_ANY_TYPE = frozenset({"type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref"})
_KNOWN = _ANNOTATIONS | _OF_ANY_TYPE | frozenset().union(*_ENFORCED.values())


def forced_call(tools: Sequence[Mapping[str, Any]], form: ToolFormat, tokenizer: Tokenizer, thinks: bool) -> Grammar:
    """Return the grammar of exactly one call of one of the tools.

    A tool's schema is followed in JSON by llguidance, and in the format of Gemma 4 and FunctionGemma by `_Arguments`.
    A keyword that cannot be enforced is an error if the tool is `strict`; if not, it is ignored. Raises GrammarError
    for a schema that cannot be followed.
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
    rules = _common_rules(form, quote)
    calls_of = []
    for index, function in enumerate(functions):
        schema, strict = _parameters(function), bool(function.get("strict"))
        if not has_finite_value(schema):
            raise GrammarError(f"All arguments of {function['name']} contain themselves, endlessly.")
        arguments = _Arguments(schema, f"f{index}", form, quote, rules, strict)
        try:
            root = arguments.root()
        except RecursionError:
            raise GrammarError(f"The parameters of {function['name']} are nested too deeply.") from None
        calls_of.append(f"{json.dumps('call:' + function['name'])} {root}")
    start = f"start: <[{opens}]> ({' | '.join(calls_of)}) <[{closes}]>"
    return lark_grammar("\n".join([start, *rules]), thinks)


def _parameters(function: Mapping[str, Any]) -> dict[str, Any]:
    return dict(function.get("parameters") or ANY_OBJECT)


def _common_rules(form: ToolFormat, quote: int) -> list[str]:
    """Return the rules that all tools use: of strings, numbers, and values that a schema leaves open."""
    # the characters of a mark, other than its token, would end a string when it is read
    marks = "|".join(re.escape(mark).replace("/", r"\/") for mark in (form.quote, form.closes, form.opens))
    rules = [
        rf"MARKED: /(?s:.*)({marks})(?s:.*)/",
        f"ANY_TEXT: /(?s:.{{0,{_MOST_CHARACTERS}}})/ & ~MARKED",
        f"INTEGER: /{_INTEGER}/",
        rf"NUMBER: /{_INTEGER}(\.[0-9]{{1,17}})?([eE][+-]?[0-9]{{1,2}})?/",
        "WORD: /[A-Za-z_][A-Za-z0-9_]{0,63}/",
        f"text: <[{quote}]> ANY_TEXT <[{quote}]>",
        'scalar: text | NUMBER | "true" | "false" | "null"',
        "any_0: scalar",
    ]
    for level in range(1, _LEVELS + 1):
        inner = f"any_{level - 1}"
        rules += [
            f'any_{level}: scalar | any_object_{level} | "[" "]" | "[" {inner} ("," {inner})* "]"',
            f'any_object_{level}: "{{" "}}" | "{{" WORD ":" {inner} ("," WORD ":" {inner})* "}}"',
        ]
    return rules


_ANY, _ANY_OBJECT = f"any_{_LEVELS}", f"any_object_{_LEVELS}"


class _Arguments:
    """Writes the rules of one tool's arguments. prefix: of their names; rules: to which they are added.

    strict: whether a keyword that cannot be enforced is an error.
    """

    def __init__(
        self, schema: Mapping[str, Any], prefix: str, form: ToolFormat, quote: int, rules: list[str], strict: bool
    ) -> None:
        self._schema, self._prefix, self._form, self._quote = schema, prefix, form, quote
        self._rules, self._strict = rules, strict
        self._count = self._followed = 0
        self._named: dict[str, str] = {}  # JSON pointer -> rule

    def root(self) -> str:
        """The expression of the arguments: an object, whatever the schema leaves open."""
        schema = self._merged({**self._schema, "type": "object"})
        if "anyOf" in schema or "oneOf" in schema or "enum" in schema or "const" in schema:
            return self._value(schema)
        return self._object(schema)

    def _rule(self, body: str, name: str | None = None) -> str:
        name = name or self._new()
        self._rules.append(f"{name}: {body}")
        return name

    def _terminal(self, body: str) -> str:
        return self._rule(body, self._new().upper())

    def _new(self) -> str:
        self._count += 1
        return f"{self._prefix}_{self._count}"

    def _value(self, schema: Any) -> str:
        if schema is False:
            raise GrammarError("A tool's parameters have a value that nothing matches.")
        if not isinstance(schema, Mapping):
            return _ANY
        own = {name: item for name, item in schema.items() if name not in _ANNOTATIONS}
        if isinstance(pointer := own.get("$ref"), str) and len(own) == 1:
            return self._referred(pointer)
        schema = self._merged(schema)
        for name in ("anyOf", "oneOf"):
            if isinstance(choices := schema.get(name), list) and choices:
                rest = {key: item for key, item in schema.items() if key != name}
                alone = _ANNOTATIONS.issuperset(rest)  # then a choice may refer to what it is in
                fitting = [each if alone else self._both(rest, each) for each in choices if each is not False]
                return self._either([self._value(each) for each in fitting])
        values = [schema["const"]] if "const" in schema else schema.get("enum")
        kinds = self._kinds(schema)
        if isinstance(values, list):
            chosen = [value for value in values if kinds is None or any(_is_of(value, kind) for kind in kinds)]
            return self._either([self._literal(value) for value in chosen])
        if kinds is None:
            self._require_enforced(schema, frozenset())
            return _ANY
        self._require_enforced(schema, frozenset().union(*(_ENFORCED[kind] for kind in kinds)))
        return self._either([self._typed(kind, schema) for kind in kinds])

    def _kinds(self, schema: Mapping[str, Any]) -> list[str] | None:
        """The types that a schema allows, None for all."""
        kinds = schema.get("type")
        if kinds is None:  # as people mean it, though a schema without a type allows others too
            kinds = next((kind for kind, words in _ENFORCED.items() if not words.isdisjoint(schema)), None)
        if kinds is None:
            return None
        kinds = [str(kind).lower() for kind in (kinds if isinstance(kinds, list) else [kinds])]
        for kind in kinds:
            if kind not in _ENFORCED:
                raise GrammarError(f"Invalid type in a tool's parameters: {kind[:80]!r}.")
        return [*kinds, "null"] if schema.get("nullable") is True else kinds

    def _require_enforced(self, schema: Mapping[str, Any], words: frozenset[str]) -> None:
        """Raise GrammarError for a keyword that would be lost, if the tool is strict."""
        lost = sorted(set(schema) - words - _ANNOTATIONS - _OF_ANY_TYPE)
        if lost := [name for name in lost if name not in _KNOWN or not words]:
            self._refuse(f"the keyword {lost[0][:80]}")

    def _refuse(self, what: str) -> None:
        if self._strict:
            raise GrammarError(f"This model's form of tool calls cannot enforce {what} of a tool's parameters.")

    def _merged(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        """Return a schema together with those that it refers to by `allOf`, or by `$ref` beside other keywords."""
        whole = dict(schema)
        parts = whole.pop("allOf", None)
        if isinstance(pointer := whole.get("$ref"), str):
            whole.pop("$ref")
            whole = self._both(whole, self._found(pointer))
        for part in parts if isinstance(parts, list) else []:
            whole = self._both(whole, part)
        return whole

    def _both(self, one: Mapping[str, Any], other: Any) -> dict[str, Any]:
        """Return the schema of what two schemas both accept."""
        if other is False:
            raise GrammarError("A tool's parameters have a value that nothing matches.")
        if not isinstance(other, Mapping):
            return dict(one)
        both, other = dict(one), self._merged(other)
        for name, item in other.items():
            if name not in both or name in _ANNOTATIONS:
                both[name] = item
            elif name == "required" and isinstance(item, list):
                both[name] = [*both[name], *item]
            elif name == "properties" and isinstance(item, Mapping):
                shared = {key: self._both(both[name][key], each) for key, each in item.items() if key in both[name]}
                both[name] = {**both[name], **item, **shared}
            elif both[name] != item:
                raise GrammarError(f"A tool's parameters state {name[:80]} twice, in ways that cannot be joined.")
        return both

    def _typed(self, kind: str, schema: Mapping[str, Any]) -> str:
        if kind == "string":
            return self._string(schema)
        if kind == "array":
            return self._array(schema)
        if kind == "object":
            return self._object(schema)
        if kind in ("integer", "number"):
            bounds = {name: schema[name] for name in _BOUNDS if name in schema}
            if not bounds:
                return "INTEGER" if kind == "integer" else "NUMBER"
            return self._rule("%json " + json.dumps({"type": kind, **bounds}))
        return '("true" | "false")' if kind == "boolean" else '"null"'

    def _string(self, schema: Mapping[str, Any]) -> str:
        least, most = (schema.get(name) for name in ("minLength", "maxLength"))
        parts = []
        if least is not None or most is not None:
            parts.append(f"(?s:.{{{_bound(least, 0)},{_bound(most, _MOST_CHARACTERS)}}})")
        if isinstance(pattern := schema.get("pattern"), str):
            parts += self._pattern(pattern)
        if isinstance(form := schema.get("format"), str):
            if form in _FORMATS:
                parts.append(_FORMATS[form])
            else:
                self._refuse(f"the format {form[:80]}")
        if not parts:
            return "text"
        expressions = [f"/{_escaped(part)}/" for part in parts]
        name = self._terminal(" & ".join([*expressions, "~MARKED"]))
        return f"<[{self._quote}]> {name} <[{self._quote}]>"

    def _pattern(self, pattern: str) -> list[str]:
        """Return the regular expression of the whole texts in which a pattern is found."""
        begins, ends = pattern.startswith("^"), bool(re.search(r"(?<!\\)(\\\\)*\$$", pattern))
        body = pattern[begins : len(pattern) - ends]
        plain = re.sub(r"\\.|\[\^?\]?(\\.|[^\]\\])*\]", "", body, flags=re.DOTALL)  # without escapes and classes
        several = "|" in _outside(plain) and (begins or ends)  # an anchor of one alternative alone
        if several or "^" in plain or "$" in plain or re.search(r"\\[bBAZzG]", body):
            self._refuse(f"the pattern {pattern[:80]}")
            return []
        anything = "(?s:.*)"
        return [f"{'' if begins else anything}({body}){'' if ends else anything}"]

    def _array(self, schema: Mapping[str, Any]) -> str:
        least, most = _bound(schema.get("minItems"), 0), schema.get("maxItems")
        if most is not None and _bound(most, 0) < least:
            raise GrammarError("A tool's parameters have a list with maxItems below minItems.")
        if most == 0 or schema.get("items") is False:
            if least:
                raise GrammarError("A tool's parameters have a list that nothing matches.")
            return '"[" "]"'
        item = self._rule(self._value(schema.get("items")))
        more = f"{{{max(least - 1, 0)},{'' if most is None else _bound(most, 0) - 1}}}"
        some = f'"[" {item} "]"' if most == 1 else f'"[" {item} ("," {item}){more} "]"'
        return self._rule(some if least else f'"[" "]" | {some}')

    def _object(self, schema: Mapping[str, Any]) -> str:
        self._require_enforced(schema, _ENFORCED["object"])
        given, others = schema.get("properties"), schema.get("additionalProperties")
        properties = dict(given) if isinstance(given, Mapping) else {}
        required = schema.get("required")
        required = [name for name in required if isinstance(name, str)] if isinstance(required, list) else []
        if missing := [name for name in required if name not in properties]:
            if others is False:
                raise GrammarError(f"A tool's parameters require {missing[0][:80]!r} and do not allow it.")
            properties |= dict.fromkeys(missing, others)
        # a value that nothing matches may only be left out
        names = sorted(name for name in properties if properties[name] is not False or name in required)
        if not names:
            return '"{" "}"' if others is False or properties else self._open_object(others)
        # after[first]: what may follow, if nothing or if something stands before it
        after = {True: '""', False: '""'}
        for name in reversed(names):  # sorted: the order in which the models' templates write them
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

    def _open_object(self, others: Any) -> str:
        """An object of any names, with values that match `additionalProperties`."""
        if not isinstance(others, Mapping) or not others:
            return _ANY_OBJECT
        value = self._rule(self._value(others))
        return self._rule(f'"{{" "}}" | "{{" WORD ":" {value} ("," WORD ":" {value})* "}}"')

    def _found(self, pointer: str) -> Any:
        self._followed += 1
        if self._followed > _MOST_REFERENCES:  # what refers to itself beside other keywords is written out without end
            raise GrammarError("A tool's parameters refer to each other too often.")
        found = pointed_at(self._schema, pointer)
        if found is None:
            raise GrammarError(f"A tool's parameters refer to {pointer[:80]!r}, which is not there.")
        return found

    def _referred(self, pointer: str) -> str:
        if pointer not in self._named:
            found = self._found(pointer)
            self._named[pointer] = name = self._new()  # first: it may refer to itself
            self._rule(self._value(found), name)
        return self._named[pointer]

    def _literal(self, value: Any) -> str:
        if isinstance(value, str):
            if any(mark in value for mark in (self._form.quote, self._form.opens, self._form.closes)):
                raise GrammarError(f"A tool's parameters cannot have the value {value[:80]!r}: it has marks of a call.")
            return f"<[{self._quote}]> {json.dumps(value, ensure_ascii=False)} <[{self._quote}]>"
        if isinstance(value, Mapping):
            if names := [name for name in value if not _KEY.fullmatch(name)]:
                raise GrammarError(f"A tool's parameter cannot be called {names[0][:80]!r}.")
            items = ' "," '.join(f"{json.dumps(key + ':')} {self._literal(item)}" for key, item in value.items())
            return f'"{{" {items} "}}"'
        if isinstance(value, list):
            items = ' "," '.join(map(self._literal, value))
            return f'"[" {items} "]"'
        return json.dumps(json.dumps(value))

    def _either(self, choices: list[str]) -> str:
        if not choices:
            raise GrammarError("A tool's parameters have a value that nothing matches.")
        return choices[0] if len(choices) == 1 else f"({' | '.join(choices)})"


def _is_of(value: Any, kind: str) -> bool:
    """Whether a JSON value is of a schema's type."""
    if isinstance(value, bool):
        return kind == "boolean"
    types: dict[str, Any] = {
        "string": str, "integer": int, "number": (int, float), "array": list, "object": Mapping, "null": type(None),
    }  # fmt: skip
    return kind in types and isinstance(value, types[kind])


def _outside(expression: str) -> str:
    """Return what of a regular expression, without escapes, is in no group."""
    depth, outside = 0, ""
    for character in expression:
        depth += (character == "(") - (character == ")")
        outside += character if not depth else ""
    return outside


def _escaped(expression: str) -> str:
    """Return a regular expression as it is written between slashes."""
    return re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\\/", expression).replace("\n", r"\n").replace("\r", r"\r")


def _bound(value: Any, default: int) -> int:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise GrammarError(f"Invalid length in a tool's parameters: {str(value)[:80]}.")
    return min(value, _MOST_CHARACTERS)
