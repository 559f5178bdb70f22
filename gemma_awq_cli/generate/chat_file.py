"""A saved chat: written as JSON lines that `quantize --calibration` reads too, and read back with checks."""

import json
from collections.abc import Sequence
from pathlib import Path

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.generate.conversation import read_turns
from gemma_awq_cli.models.text.prompter import Message
from gemma_awq_cli.system.json_input import parse_json
from gemma_awq_cli.system.reading import home_path, read_bytes
from gemma_awq_cli.system.saving import local_path, write_errors, write_new
from gemma_awq_cli.system.text_input import decode

CHAT_BYTES = 8 << 20  # the largest context has 131072 tokens; few tokens have more than 64 bytes
MOST_MESSAGES = 10_000
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

    Raises GemmaAwqError for what is not one; see `read_turns`.
    """
    where = str(path)
    text = decode(read_bytes(home_path(where), HINT, CHAT_BYTES), where)
    row = parse_json(text, where, HINT)
    given = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(given, list) or not 0 < len(given) <= MOST_MESSAGES:
        raise GemmaAwqError(f"{path} is not a saved chat: it has no list of 1 to {MOST_MESSAGES} messages.", HINT)
    system, messages = read_turns(given, where, HINT)
    if not messages or messages[-1]["role"] != "assistant":
        raise GemmaAwqError(f"{path} is not a saved chat: its last message is no answer.", HINT)
    return system, messages
