"""Which chat template a model folder has: of the files and config keys that may hold one, the one transformers takes.

A text goes through transformers' tokenizer, so the tokenizer's own come first: `chat_template.jinja`, with the further
ones of `additional_chat_templates`, then `tokenizer_config.json`. A folder whose tokenizer has none may have its
processor's, in `processor_config.json` or, of older versions, `chat_template.json`. Imports nothing heavy.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.files import read_json
from gemma_awq_cli.system.text_input import read_text

COPY = "Copy the chat template of the original model."
TEMPLATE_BYTES = 1 << 20  # the longest of the released Gemmas' has 20 kB
JINJA, ADDITIONAL = "chat_template.jinja", "additional_chat_templates"
PROCESSOR_FILES = ("processor_config.json", "chat_template.json")


@dataclass(frozen=True)
class ChatTemplate:
    """A template's text, and the file or config key that it comes from."""

    text: str
    where: str


def find_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> ChatTemplate | None:
    """The folder's chat template; None if it has none, as a base model."""
    return (
        _from_files(folder)
        or _from_config(tokenizer_config, folder / "tokenizer_config.json")
        or _from_processor(folder)
    )


def _from_files(folder: Path) -> ChatTemplate | None:
    path = folder / JINJA
    if path.is_file():
        return _checked(read_text(path, COPY, TEMPLATE_BYTES), str(path))
    if further := sorted(file.name for file in (folder / ADDITIONAL).glob("*.jinja")):
        raise GemmaAwqError(
            f"{folder / ADDITIONAL} holds {', '.join(further[:3])}, but there is no {JINJA} beside it.", COPY
        )
    return None


def _from_processor(folder: Path) -> ChatTemplate | None:
    for path in (folder / name for name in PROCESSOR_FILES):
        if path.is_file() and (found := _from_config(read_json(path, COPY), path)):
            return found
    return None


def _from_config(config: Mapping[str, Any], path: Path) -> ChatTemplate | None:
    """The template under a config's `chat_template`: a text, or of several named ones the one called default."""
    value = config.get("chat_template")
    where = f"chat_template of {path}"
    if value is None or isinstance(value, str):
        return None if value is None else _checked(value, where)
    if isinstance(value, list) and all(isinstance(one, dict) and isinstance(one.get("name"), str) for one in value):
        value = {one["name"]: one.get("template") for one in value}
    if not isinstance(value, dict):
        raise GemmaAwqError(f"The {where} is neither a text nor a list of named texts.", COPY)
    if not isinstance(value.get("default"), str):
        names = ", ".join(map(repr, sorted(value)[:5])) or "none"
        raise GemmaAwqError(f"The {where} has no text called 'default' among its templates ({names}).", COPY)
    return _checked(value["default"], where)


def _checked(text: str, where: str) -> ChatTemplate:
    if not text.strip():
        raise GemmaAwqError(f"The chat template ({where}) is empty.", f"{COPY} A base model has none: delete it.")
    if len(text) > TEMPLATE_BYTES:
        raise GemmaAwqError(f"The chat template ({where}) has {len(text)} characters.", COPY)
    return ChatTemplate(text, where)
