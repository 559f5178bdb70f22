"""Whether a JSON value is what its schema promises: jsonschema says so, and bounds hold where a schema has none.

A schema says nothing of how long a text or how large a number may be; here every text and list is bounded, every
integer fits 64 bits, and every number is finite.
"""

import json
import math
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError

LONGEST_TEXT = 10_000
LONGEST_LIST = 200_000
MAX_INTEGER = 2**63 - 1


@cache
def load_schema(name: str) -> dict[str, Any]:
    """A schema of docs/: inside the installed package, or beside it in a clone."""
    package = Path(__file__).parent.parent
    installed = package / "schemas"
    folder = installed if installed.is_dir() else package.parent / "docs"
    schema: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
    return schema


def require_schema(value: Any, schema: Mapping[str, Any], where: str | Path, hint: str) -> None:
    """An error that names the field of `value` that is not as `schema` says. where: what `value` was read from."""
    if (unbounded := next(_unbounded(value, ""), None)) is not None:
        raise GemmaAwqError(f"{where}: {unbounded}.", hint)
    error = next(_validator(json.dumps(schema)).iter_errors(value), None)
    if error is None:
        return
    while error.context:  # of several choices, the one that got furthest into the value is what its writer meant
        error = max(error.context, key=lambda choice: (len(choice.absolute_path), choice.validator != "type"))
    field = error.json_path.removeprefix("$").removeprefix(".")[:200]
    if error.validator == "required":
        missing = next(name for name in error.validator_value if name not in error.instance)
        raise GemmaAwqError(f"{where} does not tell {f'{field}.{missing}'.removeprefix('.')}.", hint)
    raise GemmaAwqError(f"{where}: {field or 'the document'} {_said(error)}.", hint)


@cache
def _validator(schema: str) -> Any:
    from jsonschema import Draft202012Validator
    from jsonschema.validators import extend

    # 2.0 is an integer to JSON Schema, and to nobody who counts with it
    types = Draft202012Validator.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int)
    return extend(Draft202012Validator, type_checker=types)(json.loads(schema))


def _said(error: Any) -> str:
    """What a schema asks for, in a few words: jsonschema's own message quotes the value, however long it is."""
    asked = error.validator_value
    match error.validator:
        case "type":
            return f"must be of type {asked if isinstance(asked, str) else ' or '.join(asked)}"
        case "const":
            return f"must be {json.dumps(asked)}"
        case "enum":
            return f"must be one of {', '.join(map(str, asked))}"
        case "minimum" | "maximum" | "exclusiveMinimum":
            words = {"minimum": "at least", "maximum": "at most", "exclusiveMinimum": "more than"}
            return f"must be {words[error.validator]} {asked}"
        case "pattern":
            return f"is not of the form {asked}"
        case "additionalProperties" | "propertyNames":
            return "has a field that is not in its schema"
        case rule:
            return f"breaks the rule {rule} of its schema"


def _unbounded(value: Any, field: str) -> Iterator[str]:
    """What no reader should have to hold, or to count with."""
    place = field.removeprefix(".") or "the document"
    if isinstance(value, str):
        if len(value) > LONGEST_TEXT:
            yield f"{place} has {len(value)} characters, more than {LONGEST_TEXT}"
    elif isinstance(value, list):
        if len(value) > LONGEST_LIST:
            yield f"{place} has {len(value)} entries, more than {LONGEST_LIST}"
        for index, item in enumerate(value):
            yield from _unbounded(item, f"{field}[{index}]")
    elif isinstance(value, dict):
        if len(value) > LONGEST_LIST or any(len(name) > LONGEST_TEXT for name in value):
            yield f"{place} has too many or too long names"
        for name, item in value.items():
            yield from _unbounded(item, f"{field}.{name[:80]}")
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{place} is not a finite number"
    elif isinstance(value, int) and not -MAX_INTEGER <= value <= MAX_INTEGER:
        yield f"{place} is a number of {len(str(abs(value)))} digits"
