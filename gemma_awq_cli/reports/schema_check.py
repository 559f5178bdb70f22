"""JSON values checked against a schema, and against bounds that hold where a schema sets none.

Every text and list is bounded in length, every integer fits in 64 bits, and every number is finite.
"""

import json
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError

LONGEST_TEXT = 10_000  # characters
LONGEST_LIST = 200_000  # entries
MAX_INTEGER = 2**63 - 1


@cache
def load_schema(name: str) -> dict[str, Any]:
    """Return a schema of docs/, by file name: from the installed package, or from beside it in a clone."""
    package = Path(__file__).parent.parent
    installed = package / "schemas"
    folder = installed if installed.is_dir() else package.parent / "docs"
    schema: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
    return schema


def require_schema(value: Any, schema: str, where: str | Path, hint: str) -> None:
    """Raise with the name of the field of `value` that does not match.

    schema: its file's name, as `load_schema` takes it. where: what `value` was read from.
    """
    if (unbounded := next(_unbounded(value, ""), None)) is not None:
        raise GemmaAwqError(f"{where}: {unbounded}.", hint)
    error = next(_validator(schema).iter_errors(value), None)
    if error is None:
        return
    while (
        error.context
    ):  # of several alternatives, the one that matched furthest into the value is what its writer meant
        error = max(error.context, key=lambda choice: (len(choice.absolute_path), choice.validator != "type"))
    field = error.json_path.removeprefix("$").removeprefix(".")[:200]
    if error.validator == "required":
        missing = next(name for name in error.validator_value if name not in error.instance)
        raise GemmaAwqError(f"{where} has no field {f'{field}.{missing}'.removeprefix('.')}.", hint)
    raise GemmaAwqError(f"{where}: {field or 'the document'} {_demand(error)}.", hint)


@cache
def _validator(schema: str) -> Any:
    from jsonschema import Draft202012Validator
    from jsonschema.validators import extend

    # JSON Schema takes 2.0 for an integer; the code that counts with it does not
    types = Draft202012Validator.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int)
    return extend(Draft202012Validator, type_checker=types)(load_schema(schema))


def _demand(error: Any) -> str:
    """Return what the schema demands, in a few words: jsonschema's own message quotes the value, however long it is."""
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
            return f"does not match the pattern {asked}"
        case "additionalProperties" | "propertyNames":
            return "has a field that is not in its schema"
        case rule:
            return f"violates the rule {rule} of its schema"


def _unbounded(value: Any, field: str) -> Iterator[str]:
    """Yield what is wrong with values that no reader should have to hold, or to calculate with."""
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
            yield f"{place} has too many fields, or too long names of fields"
        for name, item in value.items():
            yield from _unbounded(item, f"{field}.{name[:80]}")
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{place} is not a finite number"
    elif isinstance(value, int) and not -MAX_INTEGER <= value <= MAX_INTEGER:
        yield f"{place} is a number of {len(str(abs(value)))} digits"
