"""The turns of a conversation, checked: questions, answers that may call tools, and the results of these calls."""

import json
from collections.abc import Sequence
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.text.prompter import Message
from gemma_awq_cli.models.text.tool_calls import NAME, ToolCall

MOST_CALLS = 128  # of one answer


def read_turns(given: Sequence[Any], where: str, hint: str) -> tuple[str | None, list[Message]]:
    """Return the system message, or None, and the messages after it, of unknown origin.

    A question is followed by an answer; an answer that calls tools, by their results in order and another answer, or
    by the end. Raises GemmaAwqError, which names the message, for anything else.
    """
    system = None
    messages: list[Message] = []
    waiting: list[dict[str, Any]] = []  # the calls whose results come next
    asked = False
    for number, item in enumerate(given, 1):
        place = f"{where}, message {number}"
        role = item.get("role") if isinstance(item, dict) else None
        if role == "system" and number == 1:
            system = _message(item, place, hint)["content"]
        elif role == "user" and not asked and not waiting:
            messages.append(_message(item, place, hint))
            asked = True
        elif role == "assistant" and asked:
            calls = _calls(item, place, hint)
            messages.append(_message(item, place, hint, **({"tool_calls": calls} if calls else {})))
            asked, waiting = False, list(calls)
        elif role == "tool" and waiting:
            call = waiting.pop(0)
            messages.append(_message(item, place, hint, tool_call_id=call["id"], name=call["function"]["name"]))
            asked = not waiting
        else:
            raise GemmaAwqError(
                f"{place} does not follow: questions and answers (role user, assistant) come by turns, and the results "
                "of calls (role tool) after the answer that makes them.",
                hint,
            )
    return system, messages


def as_tool_call(number: int, call: ToolCall) -> dict[str, Any]:
    """Return a call as a message holds it, as in OpenAI's API but with the arguments as an object."""
    function = {"name": call.name, "arguments": json.loads(call.arguments)}
    return {"id": f"call_{number}", "type": "function", "function": function}


def _message(item: dict[str, Any], place: str, hint: str, **more: Any) -> Message:
    if not isinstance(item.get("content"), str):
        raise GemmaAwqError(f"{place} has no text as its content.", hint)
    return {"role": item["role"], "content": item["content"], **more}


def _calls(item: dict[str, Any], place: str, hint: str) -> list[dict[str, Any]]:
    given = item.get("tool_calls", [])
    if not isinstance(given, list) or len(given) > MOST_CALLS:
        raise GemmaAwqError(f"{place}: Its tool_calls are not a list of at most {MOST_CALLS} calls.", hint)
    return [_call(number, call, place, hint) for number, call in enumerate(given)]


def _call(number: int, call: Any, place: str, hint: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    name, arguments = (function.get("name"), function.get("arguments")) if isinstance(function, dict) else (None, None)
    if not isinstance(name, str) or not NAME.fullmatch(name) or not isinstance(arguments, dict):
        raise GemmaAwqError(f"{place}: Call {number + 1} has no function with a name and arguments.", hint)
    return as_tool_call(number, ToolCall(name, json.dumps(arguments)))
