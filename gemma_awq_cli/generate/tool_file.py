"""The file of tools that a model may call. Imports nothing heavy."""

from pathlib import Path
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.generate.grammar import read_text
from gemma_awq_cli.models.text.prompter import Tool
from gemma_awq_cli.models.text.tool_calls import NAME
from gemma_awq_cli.system.json_input import parse_json

MOST_TOOLS = 128  # OpenAI's own bound
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
    function = item.get("function", item) if isinstance(item, dict) else None
    if not isinstance(function, dict):
        raise GemmaAwqError(f"{where}: It is not a JSON object.", HINT)
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise GemmaAwqError(f"{where}: Its name must have 1 to 64 letters, digits, dots, dashes or underscores.", HINT)
    description = function.get("description", "")
    if not isinstance(description, str):
        raise GemmaAwqError(f"{where}: Its description is not a text.", HINT)
    described: dict[str, Any] = {"name": name, "description": description}
    if parameters is not None:
        if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
            raise GemmaAwqError(f"{where}: Its parameters are not a JSON schema of an object.", HINT)
        described["parameters"] = {"type": "object", **parameters}
    return {"type": "function", "function": described}
