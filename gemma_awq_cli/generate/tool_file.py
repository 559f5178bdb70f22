"""The file of tools that a model may call. Imports nothing heavy."""

from pathlib import Path
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.generate.grammar import read_text
from gemma_awq_cli.models.text.prompter import Tool
from gemma_awq_cli.models.text.tool_calls import MOST_TOOLS, read_tool
from gemma_awq_cli.system.json_input import parse_json

HINT = 'Give a JSON list of tools as in OpenAI\'s API: {"type": "function", "function": {"name": ...}}.'


def read_tools(path: Path) -> tuple[Tool, ...]:
    """Return the tools of a JSON file: a list of OpenAI's tools, or of their functions alone."""
    return checked_tools(parse_json(read_text(path, HINT), str(path), HINT), str(path))


def checked_tools(given: Any, where: str) -> tuple[Tool, ...]:
    """Return the tools of a list as in OpenAI's API, or of their functions alone. Raises GemmaAwqError for others."""
    if not isinstance(given, list) or not 0 < len(given) <= MOST_TOOLS:
        raise GemmaAwqError(f"{where} is not a list of 1 to {MOST_TOOLS} tools.", HINT)
    return tuple(_tool(item, f"{where}, tool {number}") for number, item in enumerate(given, 1))


def _tool(item: Any, where: str) -> Tool:
    is_function = isinstance(item, dict) and "function" not in item and "name" in item
    whole = {"type": "function", "function": item} if is_function else item
    return read_tool(whole, lambda place, why: GemmaAwqError(f"{where}: {place or 'It'} {why}.", HINT))
