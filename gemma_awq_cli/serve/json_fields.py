"""The fields of a request's JSON object, read one by one with their kinds and bounds; what nobody reads is an error.

Like OpenAI's API, a field that is null counts as absent.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError

_SHOWN = 80  # characters of a stranger's value in a message


class RequestError(GemmaAwqError):
    """A request that cannot be carried out. param: the field that is wrong; status: of HTTP; code: OpenAI's word."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


class JsonFields:
    """A JSON object. place: its name in messages, with a dot at its end; "" for the request itself."""

    def __init__(self, value: Any, place: str = "") -> None:
        if not isinstance(value, dict):
            raise RequestError(f"{place.removesuffix('.') or 'The request'} must be a JSON object.", place[:-1] or None)
        self._left: dict[str, Any] = {name: item for name, item in value.items() if item is not None}
        self.place = place

    def wrong(self, name: str, why: str) -> RequestError:
        """An error about one field: `temperature must be ...`."""
        return RequestError(f"{self.place}{name} {why}.", f"{self.place}{name}")

    def take(self, name: str) -> Any:
        """Return a value of any kind, or None."""
        return self._left.pop(name, None)

    def number(self, name: str, least: float, most: float) -> float | None:
        """Return a finite number between two bounds, both included, or None."""
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.wrong(name, f"must be a number, not {shown(value)}")
        if not least <= value <= most:
            raise self.wrong(name, f"must be from {least:g} to {most:g}, not {shown(value)}")
        return float(value)

    def integer(self, name: str, least: int, most: int) -> int | None:
        """Return an integer between two bounds, both included, or None."""
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(name, f"must be an integer, not {shown(value)}")
        if not least <= value <= most:
            raise self.wrong(name, f"must be from {least} to {most}, not {shown(value)}")
        return value

    def flag(self, name: str) -> bool | None:
        """Return true, false or None."""
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(name, f"must be true or false, not {shown(value)}")
        return value

    def text(self, name: str) -> str | None:
        """Return a string or None."""
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            raise self.wrong(name, f"must be a string, not {shown(value)}")
        return value

    def choice(self, name: str, choices: Mapping[str, Any]) -> Any:
        """Return what one of some words stands for, or None."""
        value = self.text(name)
        if value is None:
            return None
        if value not in choices:
            raise self.wrong(name, f"must be one of {', '.join(choices)}, not {shown(value)}")
        return choices[value]

    def items(self, name: str, most: int) -> list[Any]:
        """Return the items of a list, which is empty if the field is absent."""
        value = self.take(name)
        if value is not None and not isinstance(value, list):
            raise self.wrong(name, f"must be a list, not {shown(value)}")
        if value and len(value) > most:
            raise self.wrong(name, f"must have at most {most} items")
        return value or []

    def neutral(self, name: str, values: Collection[Any], why: str) -> None:
        """Accept a field with one of the values that ask for nothing, and raise for any other."""
        value = self.take(name)
        if value is not None and value not in values:
            raise RequestError(f"{self.place}{name}: {why}.", f"{self.place}{name}", code="unsupported_parameter")

    def finish(self, harmless: Collection[str] = ()) -> None:
        """Raise for a field that nobody has read, unless ignoring it changes nothing."""
        for name in self._left:
            if name not in harmless:
                raise RequestError(
                    f"Unknown or unsupported field: {self.place}{shown(name)[1:-1]}.",
                    f"{self.place}{name[:_SHOWN]}",
                    code="unknown_parameter",
                )


def shown(value: Any) -> str:
    """Return a stranger's value for a message, shortened."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
