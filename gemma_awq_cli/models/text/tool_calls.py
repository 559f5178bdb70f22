"""How Gemmas are told of tools and call them: the table of formats, and the calls in what a model writes.

Gemma 4 and FunctionGemma have tokens of their own for a call, `call:name{key:value,...}` between two marks with a third
one around each string; their chat templates write tools, calls and results. Gemma 1 to 3 have nothing of the kind: the
tools go into the prompt, in the words of Google's guide, and a call is JSON.
"""

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.system.json_input import parse_json

NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")  # of a tool, as in OpenAI's API, and a dot
NAME_RULE = "must have 1 to 64 letters, digits, dots, dashes or underscores"
MOST_TOOLS = 128  # OpenAI's own bound
_DEPTH = 32  # of the values of a call
_BARE = re.compile(r"[^,{}\[\]:]*")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_FENCE = re.compile(r"```[a-z_]*\n?(.*?)\n?```", re.DOTALL)


@dataclass(frozen=True)
class ToolFormat:
    """The tokens around a call, the one around each string of it, and the one with which a model waits for results.

    Without them, calls are JSON in the text. named_results: whether the chat template takes a result as a list of
    {"name", "response"} rather than as text.
    """

    opens: str = ""
    closes: str = ""
    quote: str = ""
    ends: str = ""
    named_results: bool = False

    @property
    def prompted(self) -> bool:
        """Whether the prompt describes tools and a call is JSON."""
        return not self.opens


GEMMA4 = ToolFormat("<|tool_call>", "<tool_call|>", '<|"|>', "<|tool_response>")
FUNCTION_GEMMA = ToolFormat(
    "<start_function_call>", "<end_function_call>", "<escape>", "<start_function_response>", named_results=True
)  # fmt: skip
PROMPTED = ToolFormat()
FORMATS = (GEMMA4, FUNCTION_GEMMA)


def format_of(template: str) -> ToolFormat:
    """Return the format of the models that have this chat template."""
    return next((form for form in FORMATS if form.opens in template and "tools" in template), PROMPTED)


def read_tool(item: Any, wrong: Callable[[str, str], Exception]) -> dict[str, Any]:
    """Return one of OpenAI's tools as chat templates take it. A field that is null counts as absent.

    wrong: makes the error that is raised, of a field's place in the tool, "" for the tool itself, and what it must be.
    """
    tool = _fields(item, "", ("type", "function"), wrong)
    if tool.get("type") != "function":
        raise wrong("type", "must be function")
    function = _fields(tool.get("function"), "function", ("name", "description", "parameters", "strict"), wrong)
    name, description = function.get("name"), function.get("description", "")
    parameters, strict = function.get("parameters"), function.get("strict", False)
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise wrong("function.name", NAME_RULE)
    if not isinstance(description, str):
        raise wrong("function.description", "must be a string")
    if not isinstance(strict, bool):
        raise wrong("function.strict", "must be true or false")
    described: dict[str, Any] = {"name": name, "description": description}
    if parameters is not None:
        if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
            raise wrong("function.parameters", "must be a JSON schema of an object")
        described["parameters"] = {"type": "object", **parameters}
    return {"type": "function", "function": {**described, **({"strict": True} if strict else {})}}


def _fields(value: Any, place: str, known: Sequence[str], wrong: Callable[[str, str], Exception]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise wrong(place, "must be a JSON object")
    given = {name: item for name, item in value.items() if item is not None}
    if unknown := [name for name in given if name not in known]:
        raise wrong(f"{place}.{unknown[0][:80]}".lstrip("."), "is unknown")
    return given


@dataclass(frozen=True)
class ToolCall:
    """A call that a model asks for. arguments: a JSON object, as text."""

    name: str
    arguments: str


def read_call(text: str, form: ToolFormat) -> ToolCall | None:
    """Return the call `call:name{...}` that a model has written between its marks; None if it is not one."""
    name, brace, rest = text.strip().removeprefix("call:").partition("{")
    if not brace or not NAME.fullmatch(name.strip()):
        return None
    reader = _Reader("{" + rest, form.quote)
    try:
        arguments = reader.value(0)
    except ValueError:
        return None
    return ToolCall(name.strip(), json.dumps(arguments, ensure_ascii=False))


class _Reader:
    """Reads the values of a call: `{key:value}`, `[value]`, quoted strings, numbers, true, false, null, bare words."""

    def __init__(self, text: str, quote: str) -> None:
        self._text, self._at = text, 0
        self._quotes = (quote, '"')

    def value(self, depth: int) -> Any:
        """Return the value that comes next. Raises ValueError."""
        if depth > _DEPTH:
            raise ValueError("nested too deeply")
        self._skip()
        if self._take("{"):
            return dict(self._items(depth, "}", named=True))
        if self._take("["):
            return [item for _, item in self._items(depth, "]", named=False)]
        for quote in self._quotes:
            if self._take(quote):
                return self._until(quote)
        return _bare(self._word())

    def _items(self, depth: int, end: str, named: bool) -> list[tuple[str, Any]]:
        items: list[tuple[str, Any]] = []
        self._skip()
        while not self._take(end):
            name = self._key() if named else ""
            items.append((name, self.value(depth + 1)))
            self._skip()
            if not self._take(",") and not self._text.startswith(end, self._at):
                raise ValueError("not a list")
            self._skip()
        return items

    def _key(self) -> str:
        key = next((self._until(quote) for quote in self._quotes if self._take(quote)), None)
        key = self._word() if key is None else key
        self._skip()
        if not self._take(":"):
            raise ValueError("no value")
        return key

    def _word(self) -> str:
        found = _BARE.match(self._text, self._at)
        assert found is not None
        self._at = found.end()
        if not (word := found[0].strip()):
            raise ValueError("nothing")
        return word

    def _until(self, quote: str) -> str:
        text, found, _ = self._text[self._at :].partition(quote)
        if not found:
            raise ValueError("no end")
        self._at += len(text) + len(quote)
        return text

    def _take(self, mark: str) -> bool:
        found = self._text.startswith(mark, self._at)
        self._at += len(mark) if found else 0
        return found

    def _skip(self) -> None:
        while self._text[self._at : self._at + 1].isspace():
            self._at += 1


def _bare(word: str) -> Any:
    if word in ("true", "false", "null"):
        return json.loads(word)
    if _NUMBER.fullmatch(word) and len(word) < 300:
        number = json.loads(word)
        return number if abs(number) != float("inf") else word
    return word


def may_be_calls(text: str) -> bool:
    """Whether an answer that begins like this may still turn out to be calls in the text."""
    begins = text.lstrip()[:3]
    return begins[:1] in ("", "[", "{") or "```".startswith(begins)


def read_calls(text: str) -> list[ToolCall]:
    """Return the calls that an answer in a prompted format consists of; none if it has any other text.

    Read are `{"name": ..., "parameters": {...}}`, `arguments` in place of `parameters`, a list of those, one per line,
    and `[name(key=value)]`; each may be in a code block.
    """
    text = text.strip()
    if blocks := _FENCE.findall(text):
        if _FENCE.sub("", text).strip():
            return []
        text = "\n".join(blocks).strip()
    values = _json_values(text)
    calls = [_json_call(value) for value in values] if values is not None else _python_calls(text)
    found = [call for call in calls if call is not None]
    return found if len(found) == len(calls) else []


def _json_values(text: str) -> list[Any] | None:
    for whole in (text, "[" + ",".join(filter(str.strip, text.splitlines())) + "]"):
        try:
            value = parse_json(whole, "", "")
        except GemmaAwqError:
            continue
        return value if isinstance(value, list) else [value]
    return None


def _json_call(value: Any) -> ToolCall | None:
    if not isinstance(value, dict):
        return None
    value = value.get("function") if isinstance(value.get("function"), dict) else value
    name, arguments = value.get("name"), value.get("parameters", value.get("arguments", {}))
    if not isinstance(name, str) or not NAME.fullmatch(name) or not isinstance(arguments, dict):
        return None
    return ToolCall(name, json.dumps(arguments, ensure_ascii=False))


def _python_calls(text: str) -> list[ToolCall | None]:
    try:
        body = ast.parse(text, mode="eval").body
        return [_python_call(item) for item in (body.elts if isinstance(body, ast.List) else [body])]
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return []


def _python_call(item: ast.expr) -> ToolCall | None:
    if not isinstance(item, ast.Call) or item.args or any(keyword.arg is None for keyword in item.keywords):
        return None
    name = ast.unparse(item.func)
    arguments = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in item.keywords}
    if not NAME.fullmatch(name):
        return None
    return ToolCall(name, json.dumps(arguments, ensure_ascii=False, allow_nan=False))


def with_named_results(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with each result as a list of its tool's name and an object, whatever text it was."""
    return [
        {**message, "content": [{"name": message["name"], "response": _response(message["content"])}]}
        if message["role"] == "tool"
        else dict(message)
        for message in messages
    ]


def _response(content: str) -> dict[str, Any]:
    try:
        value = parse_json(content, "", "")
    except GemmaAwqError:
        value = content
    return value if isinstance(value, dict) else {"value": value}


INTRODUCTION = (
    "You have access to functions. If you decide to invoke any of the function(s), you MUST put it in the format of "
    '{"name": function name, "parameters": dictionary of argument name and its value}\n'
    "You SHOULD NOT include any other text in the response if you call a function\n"
)


def prompted(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a conversation with tools for a chat template that knows none: tools, calls and results as text."""
    functions = [tool["function"] for tool in tools]
    shown = INTRODUCTION + json.dumps(functions, ensure_ascii=False, indent=2) if functions else ""
    texts: list[dict[str, Any]] = []
    if messages and messages[0]["role"] == "system":
        shown = "\n\n".join(filter(None, (messages[0]["content"], shown)))
        messages = messages[1:]
    if shown:
        texts.append({"role": "system", "content": shown})
    for message in messages:
        role, content = message["role"], message["content"] or ""
        if role == "tool":
            role, content = "user", f"```tool_output\n{content}\n```"
        calls = [
            json.dumps({"name": call["function"]["name"], "parameters": call["function"]["arguments"]},
                       ensure_ascii=False)
            for call in message.get("tool_calls", ())
        ]  # fmt: skip
        content = "\n".join(filter(None, (content, *calls)))
        if texts and texts[-1]["role"] == role:  # several results, or a result and a question
            content = f"{texts.pop()['content']}\n\n{content}"
        texts.append({"role": role, "content": content})
    return texts
