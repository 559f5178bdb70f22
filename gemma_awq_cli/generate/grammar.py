"""What an answer must look like: a JSON schema, a grammar or a regular expression. Imports nothing heavy.

`constraints.py` makes of it what lets a model generate nothing else.
"""

import json
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.system.json_input import parse_json
from gemma_awq_cli.system.reading import read_bytes

JSON_SCHEMA, LARK = "json_schema", "lark"
LARGEST_GRAMMAR = 1 << 18  # bytes; OpenAI's limit of a schema is 120,000 characters
# Members of one object of a schema: 1000 optional properties take 0.3 s to compile, and the time grows as the square.
MOST_MEMBERS = 1000
ANY_OBJECT: dict[str, Any] = {"type": "object"}


class GrammarError(GemmaAwqError):
    """A schema or a grammar that cannot be followed. Another one may be fine."""


@dataclass(frozen=True)
class Grammar:
    """What every answer must match.

    kind: `json_schema` or `lark`, llguidance's dialect of Lark, whose `start: /.../` is a regular expression. text: the
    schema as JSON, or the grammar. strict: whether a keyword of the schema that cannot be enforced is an error; if not,
    it is ignored, and `oneOf` counts as `anyOf`. thinks: whether thoughts may come before the answer; they are free.
    """

    kind: str
    text: str
    strict: bool = True
    thinks: bool = False


def schema_grammar(schema: Any, strict: bool = True, thinks: bool = False) -> Grammar:
    """Return the grammar of a JSON schema. Raises GrammarError if it is not one, or too large."""
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    if not isinstance(schema, dict):
        raise GrammarError("The JSON schema is not a JSON object.")
    if (most := _most_members(schema)) > MOST_MEMBERS:
        raise GrammarError(f"The JSON schema has an object with {most} members; the limit is {MOST_MEMBERS}.")
    return Grammar(JSON_SCHEMA, _bounded(json.dumps(schema, ensure_ascii=False), "JSON schema"), strict, thinks)


def lark_grammar(text: str, thinks: bool = False) -> Grammar:
    """Return the grammar of a text in Lark's notation. Raises GrammarError if it is too large."""
    return Grammar(LARK, _bounded(text, "grammar"), thinks=thinks)


def read_grammar(schema: Path | None, lark: Path | None, thinks: bool) -> Grammar | None:
    """Return the grammar of a file with a JSON schema or of one in Lark's notation; None without either."""
    if schema is not None and lark is not None:
        raise UsageError("--json-schema and --grammar exclude each other.", "Leave one of them out.")
    if schema is not None:
        hint = "Give a file with a JSON schema."
        text = read_text(schema, hint)
        return schema_grammar(parse_json(text, str(schema), hint), thinks=thinks)
    return None if lark is None else lark_grammar(read_text(lark, "Give a file with a Lark grammar."), thinks)


def read_text(path: Path, hint: str) -> str:
    """Return the text of a file in UTF-8. Raises GemmaAwqError if it is another or has too many bytes."""
    data = read_bytes(path, hint, LARGEST_GRAMMAR)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise GemmaAwqError(f"{path} is not UTF-8 at byte {error.start}.", hint) from None


def _most_members(value: Any) -> int:
    """Return how many members the largest object in a JSON value has."""
    if isinstance(value, dict):
        return max(len(value), *(_most_members(item) for item in value.values()), 0)
    return max(map(_most_members, value), default=0) if isinstance(value, list) else 0


def has_finite_value(schema: dict[str, Any]) -> bool:
    """Return False if whatever a schema accepts would have to contain itself, through references, without end.

    A thousand references take two seconds if each waits for the next.
    A reference counts as finite once what it leads to is known to be; the rest is the least fixed point.
    """
    waiting = {pointer: pointed_at(schema, pointer) for pointer in _pointers(schema)}
    finite = {pointer for pointer, target in waiting.items() if target is None}  # unknown: llguidance says why
    while True:
        found = {pointer for pointer, target in waiting.items() if pointer not in finite and _is_finite(target, finite)}
        if not found:
            return _is_finite(schema, finite)
        finite |= found


def _is_finite(schema: Any, finite: Set[str]) -> bool:
    if not isinstance(schema, dict):
        return True
    if isinstance(pointer := schema.get("$ref"), str) and pointer not in finite:
        return False
    for name in ("anyOf", "oneOf"):
        if isinstance(choices := schema.get(name), list) and not any(_is_finite(each, finite) for each in choices):
            return False
    if isinstance(parts := schema.get("allOf"), list) and not all(_is_finite(each, finite) for each in parts):
        return False
    kinds = schema.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if "enum" in schema or "const" in schema or any(kind not in ("object", "array") for kind in kinds):
        return True
    properties, required = schema.get("properties"), schema.get("required")
    if "object" in kinds:
        names = [name for name in required if isinstance(name, str)] if isinstance(required, list) else []
        inner = [properties.get(name) for name in names] if isinstance(properties, dict) else []
        if all(_is_finite(each, finite) for each in inner):
            return True
    return "array" in kinds and (not schema.get("minItems") or _is_finite(schema.get("items"), finite))


def _pointers(value: Any) -> set[str]:
    """Return the references in a JSON value to other parts of it."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    own = value.get("$ref") if isinstance(value, dict) else None
    return ({own} if isinstance(own, str) else set[str]()).union(*map(_pointers, inner))


def pointed_at(root: Any, pointer: str) -> Any:
    """Return what a JSON pointer such as `#/$defs/name` leads to, or None."""
    if not pointer.startswith("#"):
        return None
    for step in pointer[1:].split("/")[1:]:
        root = root.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(root, dict) else None
    return root


def _bounded(text: str, what: str) -> str:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise GrammarError(f"The {what} contains half of a surrogate pair.", "Write it in UTF-8.") from None
    if size > LARGEST_GRAMMAR:
        raise GrammarError(f"The {what} has {size} bytes; the limit is {LARGEST_GRAMMAR}.", "Shorten it.")
    return text
