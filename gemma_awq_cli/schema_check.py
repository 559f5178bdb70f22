"""Whether a JSON value is what its schema promises: the part of JSON Schema that this project's two schemas use.

Written by hand because a schema alone does not bound what it says nothing of: here every text, list and number is
bounded, and every number finite, also where the schema has no word for it.
"""

import json
import math
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError

MISSING = "is missing"
LONGEST_TEXT = 10_000
LONGEST_LIST = 200_000
LARGEST = 10**18  # of a number, either way

_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "integer": (int,), "number": (int, float),
    "boolean": (bool,), "null": (type(None),),
}  # fmt: skip


@cache
def load_schema(name: str) -> dict[str, Any]:
    """A schema of docs/: inside the installed package, or beside it in a clone."""
    package = Path(__file__).parent
    installed = package / "schemas"
    folder = installed if installed.is_dir() else package.parent / "docs"
    schema: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
    return schema


def require_schema(value: Any, schema: Mapping[str, Any], where: str | Path, hint: str) -> None:
    """An error that names the field of `value` that is not as `schema` says. where: what `value` was read from."""
    if (problem := _problem(value, schema, schema, "")) is not None:
        field, said = problem[0].removeprefix(".") or "the document", problem[1]
        raise GemmaAwqError(f"{where} does not tell {field}." if said == MISSING else f"{where}: {field} {said}.", hint)


def _problem(value: Any, schema: Mapping[str, Any], root: Mapping[str, Any], field: str) -> tuple[str, str] | None:
    """The first field that is wrong, and what is wrong with it."""
    if (reference := schema.get("$ref")) is not None:
        return _problem(value, root["$defs"][reference.removeprefix("#/$defs/")], root, field)
    if (choices := schema.get("anyOf")) is not None:
        failed = [problem for choice in choices if (problem := _problem(value, choice, root, field)) is not None]
        # of several, the one that got furthest into the value is what its writer meant
        return max(failed, key=lambda problem: len(problem[0])) if len(failed) == len(choices) else None
    said = _said(value, schema)
    if said is not None:
        return field, said
    if isinstance(value, dict):
        return _problem_in_object(value, schema, root, field)
    if isinstance(value, list):
        items = schema.get("items", {})
        problems = (_problem(item, items, root, f"{field}[{index}]") for index, item in enumerate(value))
        return next((problem for problem in problems if problem is not None), None)
    return None


def _problem_in_object(
    value: dict[str, Any], schema: Mapping[str, Any], root: Mapping[str, Any], field: str
) -> tuple[str, str] | None:
    known, further = schema.get("properties", {}), schema.get("additionalProperties", True)
    for name in schema.get("required", ()):
        if name not in value:
            return f"{field}.{name}", MISSING
    names = schema.get("propertyNames", {})
    for name, item in value.items():
        shown = f"{field}.{name if len(name) < 80 else name[:80] + '...'}"
        if _said(name, names) is not None:
            return shown, "has a name that no such field has"
        if name not in known and further is False:
            return shown, "is not a field of this schema"
        below = known.get(name, further if isinstance(further, dict) else {})
        if (problem := _problem(item, below, root, shown)) is not None:
            return problem
    return None


def _said(value: Any, schema: Mapping[str, Any]) -> str | None:
    """What is wrong with a value itself, apart from what lies in it; None if nothing is."""
    kinds = schema.get("type")
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds is not None and not any(_is(value, kind) for kind in kinds):
        return f"must be of type {' or '.join(kinds)}"
    if "const" in schema and (value != schema["const"] or isinstance(value, bool) != isinstance(schema["const"], bool)):
        return f"must be {json.dumps(schema['const'])}"
    if "enum" in schema and value not in schema["enum"]:
        return f"must be one of {', '.join(map(str, schema['enum']))}"
    if isinstance(value, str):
        return _said_of_text(value, schema)
    if isinstance(value, list):
        if len(value) > schema.get("maxItems", LONGEST_LIST):
            return "is too long a list"
        return "is too short a list" if len(value) < schema.get("minItems", 0) else None
    if isinstance(value, dict):
        return "has too many fields" if len(value) > schema.get("maxProperties", LONGEST_LIST) else None
    return _said_of_number(value, schema) if isinstance(value, int | float) else None


def _said_of_text(value: str, schema: Mapping[str, Any]) -> str | None:
    longest = schema.get("maxLength", LONGEST_TEXT)
    if len(value) > longest:
        return f"has {len(value)} characters, more than {longest}"
    if len(value) < schema.get("minLength", 0):
        return "is empty"
    pattern = schema.get("pattern")
    # `$` is the very end in JSON Schema, while Python's may be before a last line break
    if pattern is not None and re.search(re.sub(r"\$\Z", r"\\Z", pattern), value) is None:
        return f"is not of the form {pattern}"
    return None


def _said_of_number(value: float, schema: Mapping[str, Any]) -> str | None:
    if isinstance(value, float) and not math.isfinite(value):
        return "is not a finite number"
    least, most = schema.get("minimum", -LARGEST), schema.get("maximum", LARGEST)
    if value < least:
        return f"is less than {least}"
    if value > most:
        return f"is more than {most}"
    above = schema.get("exclusiveMinimum")
    return f"must be more than {above}" if above is not None and value <= above else None


def _is(value: Any, kind: str) -> bool:
    """JSON's types: a boolean is no number, and 2.0 is no integer that a file of ours would hold."""
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, _TYPES[kind])
