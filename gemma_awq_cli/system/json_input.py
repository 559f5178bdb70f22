"""JSON from outside: a value or an object parsed within bounds, or a large array item by item."""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.system.failures import first_line
from gemma_awq_cli.system.text_input import LINE_BYTES, require_utf8_mark

JSON_BYTES = 64 * 1024 * 1024  # the largest released tokenizer.json has 33 MB, everything else is far smaller
JSON_DEPTH = 64
_BLOCK = 1 << 16
_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(text: str, where: object, hint: str, depth: int = JSON_DEPTH) -> Any:
    """A JSON value; an error that names `where` for what is not JSON, or cannot be held as text again.

    Bounded: nesting by `depth`, integers by Python's own limit of digits. NaN and Infinity are not JSON.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise GemmaAwqError(f"{where} is nested too deeply.", hint) from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}" if "\n" in text else f"character {error.colno}"
        raise GemmaAwqError(f"{where} is not valid JSON: {error.msg} at {place}.", hint) from None
    except ValueError as error:  # an integer of too many digits, or a constant
        raise GemmaAwqError(f"{where} is not valid JSON: {first_line(error)}.", hint) from None
    _require_sound(value, where, hint, depth, surrogates=_ESCAPED_SURROGATE.search(text) is not None)
    return value


def parse_json_object(text: str, where: str | Path, hint: str) -> dict[str, Any]:
    """A JSON object; see `parse_json`."""
    value = parse_json(text, where, hint)
    if not isinstance(value, dict):
        raise GemmaAwqError(f"{where} does not hold a JSON object.", hint)
    return value


def json_items(stream: BinaryIO, where: object, hint: str, limit: int = LINE_BYTES) -> Iterator[tuple[int, str]]:
    """The items of a JSON array, one at a time: their numbers from 1 and their text, for `parse_json`.

    An error for what is no array, and for an item of more than `limit` characters. Raises what the stream raises.
    """
    items = _ArrayText(stream, where, hint)
    if items.take() != "[":
        raise GemmaAwqError(f"{where} does not hold a JSON array.", hint)
    number = 0
    while number or items.peek() != "]":
        number += 1
        yield number, items.value(number, limit)
        following = items.take()
        if following == "]":
            break
        if following != ",":
            found = repr(following) if following else "the end of the file"
            raise GemmaAwqError(f"{where} is not valid JSON: {found} after item {number}.", hint)
    if not number:
        items.take()
    if following := items.take():
        raise GemmaAwqError(f"{where} is not valid JSON: {following!r} after the array.", hint)


class _ArrayText:
    """The text of a JSON array, of which no more is held than the item that is read."""

    def __init__(self, stream: BinaryIO, where: object, hint: str) -> None:
        self._stream, self._where, self._hint = stream, where, hint
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._scanner = json.JSONDecoder()
        self._text, self._at, self._ended, self._bytes = "", 0, False, 0

    def peek(self) -> str:
        """The next character that is no white space, "" at the end; it is read again."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._more()

    def take(self) -> str:
        """The next character that is no white space, "" at the end."""
        found = self.peek()
        self._at += len(found)
        return found

    def value(self, number: int, limit: int) -> str:
        """The text of the JSON value that comes next."""
        self.peek()
        while True:
            reason = ""
            try:
                end = self._scanner.raw_decode(self._text, self._at)[1]
            except RecursionError:
                raise GemmaAwqError(f"{self._where}, item {number} is nested too deeply.", self._hint) from None
            except json.JSONDecodeError as error:
                end, reason = -1, error.msg
            except ValueError as error:  # an integer of too many digits
                end, reason = -1, first_line(error)
            # a number at the end of what was read may go on
            if end >= 0 and (end < len(self._text) or self._ended):
                value, self._at = self._text[self._at : end], end
                return value
            if self._ended:
                raise GemmaAwqError(f"{self._where}, item {number} is not valid JSON: {reason}.", self._hint)
            if len(self._text) - self._at > limit:
                reason = reason or "it is too long"
                raise GemmaAwqError(
                    f"{self._where}, item {number} is not valid JSON within {limit} characters: {reason}.", self._hint
                )
            self._more()

    def _more(self) -> None:
        """Read on, at least as much again as is held: so an item is parsed few times, however long it is."""
        held = self._text[self._at :]
        block = self._stream.read(max(_BLOCK, len(held)))
        if not self._bytes:
            require_utf8_mark(block, self._where)
        try:
            self._text, self._at = held + self._decoder.decode(block, final=not block), 0
        except UnicodeDecodeError as error:
            at = self._bytes + error.start
            raise GemmaAwqError(f"{self._where} is not UTF-8 at byte {at}.", "Convert it to UTF-8.") from None
        self._bytes += len(block)
        self._ended = not block


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


def _require_sound(value: Any, where: object, hint: str, depth: int, surrogates: bool) -> None:
    """Nesting within `depth`, and no half of a surrogate pair in any text."""
    level = [value]
    for levels_left in range(depth, -1, -1):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += item.values()
                if surrogates:
                    below += item
            elif isinstance(item, list):
                below += item
            elif surrogates and isinstance(item, str) and _SURROGATE.search(item):
                raise GemmaAwqError(f"{where} holds half of a surrogate pair.", hint)
        if not levels_left and any(isinstance(item, dict | list) for item in level):
            break
        if not below:
            return
        level = below
    raise GemmaAwqError(f"{where} is nested too deeply.", hint)
