"""A saved chat: written as JSON lines that `quantize --calibration` reads too, and read back with checks."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.text.prompter import Message
from gemma_awq_cli.models.text.tool_calls import NAME, ToolCall
from gemma_awq_cli.system.json_input import parse_json
from gemma_awq_cli.system.reading import home_path, read_bytes
from gemma_awq_cli.system.saving import local_path, write_errors, write_new
from gemma_awq_cli.system.text_input import decode

CHAT_BYTES = 8 << 20  # the largest context has 131072 tokens; few tokens have more than 64 bytes
MOST_MESSAGES = 10_000
MOST_CALLS = 128  # of one answer
HINT = "Give a file that /save wrote from a chat."
_ANOTHER = "give another name"


def write_chat(path: Path, messages: Sequence[Message], answers: bool) -> None:
    """Write a conversation as JSON lines. An existing `path` is an error.

    answers: whether the messages are one conversation, on one line, rather than pairs of a prompt and its completion,
    on a line each.
    """
    lines: list[object] = [{"messages": list(messages)}]
    if not answers:
        pairs = zip(messages[::2], messages[1::2], strict=True)
        lines = [{"prompt": asked["content"], "response": answer["content"]} for asked, answer in pairs]
    content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
    with write_errors(path, _ANOTHER):
        try:
            write_new(local_path(path, _ANOTHER), content)
        except FileExistsError:
            raise GemmaAwqError(f"{path} exists.", "Give another name.") from None


def read_chat(path: Path) -> tuple[str | None, list[Message]]:
    """Return the system message, or None, and the messages of a saved chat, which end with an answer.

    A question is followed by an answer; an answer that calls tools, by their results in order and another answer, or
    by the end. Raises GemmaAwqError, which names the message, for anything else.
    """
    where = str(path)
    text = decode(read_bytes(home_path(where), HINT, CHAT_BYTES), where)
    row = parse_json(text, where, HINT)
    given = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(given, list) or not 0 < len(given) <= MOST_MESSAGES:
        raise GemmaAwqError(f"{path} is not a saved chat: it has no list of 1 to {MOST_MESSAGES} messages.", HINT)
    system = None
    messages: list[Message] = []
    waiting: list[dict[str, Any]] = []  # the calls whose results come next
    asked = False
    for number, item in enumerate(given, 1):
        place = f"{path}, message {number}"
        role = item.get("role") if isinstance(item, dict) else None
        if role == "system" and number == 1:
            system = _message(item, place)["content"]
        elif role == "user" and not asked and not waiting:
            messages.append(_message(item, place))
            asked = True
        elif role == "assistant" and asked:
            calls = _calls(item, place)
            messages.append(_message(item, place, **({"tool_calls": calls} if calls else {})))
            asked, waiting = False, list(calls)
        elif role == "tool" and waiting:
            call = waiting.pop(0)
            messages.append(_message(item, place, tool_call_id=call["id"], name=call["function"]["name"]))
            asked = not waiting
        else:
            raise GemmaAwqError(
                f"{place} does not follow: a saved chat has questions and answers by turns (role user, assistant).",
                HINT,
            )
    if not messages or messages[-1]["role"] != "assistant":
        raise GemmaAwqError(f"{path} is not a saved chat: its last message is no answer.", HINT)
    return system, messages


def _message(item: dict[str, Any], place: str, **more: Any) -> Message:
    if not isinstance(item.get("content"), str):
        raise GemmaAwqError(f"{place} has no text as its content.", HINT)
    return {"role": item["role"], "content": item["content"], **more}


def as_tool_call(number: int, call: ToolCall) -> dict[str, Any]:
    """Return a call as a message holds it, as in OpenAI's API but with the arguments as an object."""
    function = {"name": call.name, "arguments": json.loads(call.arguments)}
    return {"id": f"call_{number}", "type": "function", "function": function}


def _calls(item: dict[str, Any], place: str) -> list[dict[str, Any]]:
    given = item.get("tool_calls", [])
    if not isinstance(given, list) or len(given) > MOST_CALLS:
        raise GemmaAwqError(f"{place}: Its tool_calls are not a list of at most {MOST_CALLS} calls.", HINT)
    return [_call(number, call, place) for number, call in enumerate(given)]


def _call(number: int, call: Any, place: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    name, arguments = (function.get("name"), function.get("arguments")) if isinstance(function, dict) else (None, None)
    if not isinstance(name, str) or not NAME.fullmatch(name) or not isinstance(arguments, dict):
        raise GemmaAwqError(f"{place}: Call {number + 1} has no function with a name and arguments.", HINT)
    return as_tool_call(number, ToolCall(name, json.dumps(arguments)))
