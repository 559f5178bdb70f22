"""The forms of a dataset's row: a text or a conversation, under any of the keys that are in common use.

The one place that knows these forms, for calibration, for the text of a bench and for files of prompts.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError, some
from gemma_awq_cli.models.text.prompter import Message

# Keys of a question and its answer. A saved chat has the first pair.
PAIRS = (("prompt", "response"), ("prompt", "completion"), ("question", "answer"), ("query", "response"))
TURNS = ("messages", "conversations", "conversation")
INSTRUCTION_INPUTS = ("input", "context")
INSTRUCTION_ANSWERS = ("output", "response")
KEYS = frozenset(
    {"text", "content", "system", "instruction", *TURNS, *INSTRUCTION_INPUTS, *INSTRUCTION_ANSWERS}.union(*PAIRS)
)
FORMS = (
    "text or content; prompt, question or query with response, completion or answer; instruction (and input) with "
    "output; messages with role and content; conversations with from and value"
)
FORMS_HINT = (
    f"Name the column that holds the text or the messages with --text-column. Without it, rows may have {FORMS}."
)
# Who speaks in ShareGPT's conversations -> the chat templates' role.
_SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "system": "system",
}  # fmt: skip
_TOOLS = ("tool", "function", "function_call", "function_response", "observation", "ipython")
_TOOLS_HINT = "Leave out conversations with tools: only turns of the user, the assistant and the system are read."
_MESSAGES_HINT = 'A message is {"role": "user", "content": "..."}; its content is a string or a list of text parts.'
_SHOWN = 12  # keys of a row that an error lists
_LONG = 40  # characters of each that it shows


@dataclass(frozen=True)
class Document:
    """A text or a conversation. where: its place in an error message, such as its file and line."""

    content: str | list[Message]
    where: object

    @property
    def characters(self) -> int:
        """Length of its text, without roles."""
        if isinstance(self.content, str):
            return len(self.content)
        return sum(len(message["content"]) for message in self.content)


def document_from_row(row: Any, column: str | None, where: object) -> Document:
    """Return the document that a row holds: a string, a list of messages, or an object with either.

    column: the key that holds the text or the messages, None to look for the known ones. Raises with what is wrong with
    the row, or the keys that it has.
    """
    if isinstance(row, str):
        return Document(require_sound(row, where), where)
    if isinstance(row, list):
        return Document(read_messages(row, where), where)
    if not isinstance(row, dict):
        raise GemmaAwqError(f"{where} is {_kind(row)}; an object with a text is needed.", FORMS_HINT)
    if column is not None:
        return Document(_of_column(row, column, where), where)
    if isinstance(row.get("text"), str):
        return Document(require_sound(row["text"], where), where)
    turns = _pair(row, PAIRS[:1], where) or _turns(row, where) or _pair(row, PAIRS[1:], where) or _task(row, where)
    if turns:
        return Document(_after_system(row, turns, where), where)
    if isinstance(row.get("content"), str):
        return Document(require_sound(row["content"], where), where)
    raise GemmaAwqError(f"{where} has no text in a known form; it has {named_keys(row)}.", FORMS_HINT)


def read_messages(value: Any, where: object) -> list[Message]:
    """Return chat messages from a list of `role` and `content`, or of ShareGPT's `from` and `value`.

    A content that is a list of text parts is joined, as Gemma's own template does. Raises for other parts, and for what
    is not a list of messages.
    """
    if not isinstance(value, list) or not value:
        raise GemmaAwqError(f"{where} has {_kind(value)} instead of messages.", _MESSAGES_HINT)
    return [_message(message, f"{where}, message {number}") for number, message in enumerate(value, 1)]


def require_sound(text: str, where: object) -> str:
    """Return `text`; raises if it holds a NUL character or half of a surrogate pair."""
    if "\0" in text:
        raise GemmaAwqError(f"{where} has a NUL character in its text.", "Remove it.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise GemmaAwqError(f"{where} holds half of a surrogate pair.", "Write the text in UTF-8.") from None
    return text


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise GemmaAwqError(f"{where} is {_kind(message)}.", _MESSAGES_HINT)
    if "from" in message and "role" not in message:
        speaker, content = message["from"], message.get("value")
        role = _SPEAKERS.get(speaker.lower()) if isinstance(speaker, str) else None
        named = speaker
    else:
        role, content = message.get("role"), message.get("content")
        named = role
    if isinstance(named, str) and named.lower() in _TOOLS:
        raise GemmaAwqError(f"{where} is a {named} turn.", _TOOLS_HINT)
    if message.get("tool_calls"):
        raise GemmaAwqError(f"{where} has tool_calls.", _TOOLS_HINT)
    if not isinstance(role, str) or not role:
        said = "no role" if named is None else f"the unknown role {_short(named)}"
        raise GemmaAwqError(f"{where} has {said}; its keys: {named_keys(message)}.", _MESSAGES_HINT)
    return {"role": require_sound(role, where), "content": require_sound(_content(content, where), where)}


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise GemmaAwqError(f"{where} has {_kind(content)} as its content.", _MESSAGES_HINT)
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        text = part.get("text") if isinstance(part, dict) else part
        if kind != "text":
            raise GemmaAwqError(f"{where} has a part of type {_short(kind)}; only text is read.", _MESSAGES_HINT)
        if not isinstance(text, str):
            raise GemmaAwqError(f"{where} has a part without text.", _MESSAGES_HINT)
        texts.append(text)
    return "".join(texts)


def _of_column(row: Mapping[str, Any], column: str, where: object) -> str | list[Message]:
    value = row.get(column)
    if isinstance(value, str):
        return require_sound(value, where)
    if isinstance(value, list):
        return read_messages(value, where)
    if column not in row:
        raise GemmaAwqError(f"{where} has no text column {_short(column)!r}.", f"It has {named_keys(row)}.")
    raise GemmaAwqError(
        f"{where} has {_kind(value)} in the column {_short(column)!r}; a text or messages are needed.",
        f"Name another column with --text-column; it has {named_keys(row)}.",
    )


def _turns(row: Mapping[str, Any], where: object) -> list[Message] | None:
    name = next((name for name in TURNS if isinstance(row.get(name), list)), None)
    return None if name is None else read_messages(row[name], where)


def _pair(row: Mapping[str, Any], pairs: Iterable[tuple[str, str]], where: object) -> list[Message] | None:
    """Return the first question and answer whose keys the row has. Each may be a string or a list of messages."""
    for asked, answered in pairs:
        if isinstance(row.get(asked), str | list) and isinstance(row.get(answered), str | list):
            return [*_side(row[asked], "user", where), *_side(row[answered], "assistant", where)]
    return None


def _task(row: Mapping[str, Any], where: object) -> list[Message] | None:
    """Return a row in Alpaca's form: an instruction, its input if there is one, and the answer."""
    answer = next((row[name] for name in INSTRUCTION_ANSWERS if isinstance(row.get(name), str)), None)
    if not isinstance(row.get("instruction"), str) or answer is None:
        return None
    given = next((row[name] for name in INSTRUCTION_INPUTS if isinstance(row.get(name), str) and row[name]), None)
    asked = row["instruction"] if given is None else f"{row['instruction']}\n\n{given}"
    return [*_side(asked, "user", where), *_side(answer, "assistant", where)]


def _side(value: str | list[Any], role: str, where: object) -> list[Message]:
    if isinstance(value, list):
        return read_messages(value, where)
    return [{"role": role, "content": require_sound(value, where)}]


def _after_system(row: Mapping[str, Any], turns: list[Message], where: object) -> list[Message]:
    """Put the row's `system` before the turns, unless they begin with a system message."""
    system = row.get("system")
    if not isinstance(system, str) or not system or turns[0]["role"] == "system":
        return turns
    return [{"role": "system", "content": require_sound(system, where)}, *turns]


def _kind(value: Any) -> str:
    """Return what kind of value this is, in words."""
    if value is None:
        return "null"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", dict: "an object"}
    return names.get(type(value), f"a value of type {type(value).__name__}")


def named_keys(keys: Iterable[Any]) -> str:
    """Return the first keys of a row as a list for an error message."""
    named = [_short(key) for key in keys]
    if not named:
        return "no keys"
    return some(named, _SHOWN)


def _short(value: Any) -> str:
    """Return a stranger's word for an error message: on one line, and shortened."""
    text = value if isinstance(value, str) else repr(value)
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= _LONG else f"{text[:_LONG]}..."
