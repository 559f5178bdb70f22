"""What a source checkpoint's own model card says of its licence and its base: the YAML at the top of its README.md.

The file is a stranger's. It is read before anything is computed, and of YAML only what is needed: texts and short lists
of texts. An alias, which may stand for gigabytes, is refused, and so is a card too large to be one.
"""

import re
from pathlib import Path
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.files import require_inside
from gemma_awq_cli.system.failures import first_line
from gemma_awq_cli.system.reading import read_bytes
from gemma_awq_cli.system.text_input import decode

README = "README.md"
DECLARED = ("license", "license_name", "license_link", "base_model")
UNREADABLE = "unreadable"  # the key under which a report says why nothing is known
README_BYTES = 16 * 1024 * 1024
METADATA_CHARACTERS = 64 * 1024
LONGEST, MOST = 500, 20  # characters of a text, texts of a list
_BEGIN, _END = re.compile(r"\s*---[ \t]*\r?\n"), re.compile(r"^---[ \t]*\r?$", re.MULTILINE)
_NOTHING = ("", "~", "null", "Null", "NULL")


def source_card(folder: Path) -> dict[str, Any] | None:
    """What the card in `folder` declares, by the names in DECLARED; None if there is no card, or no metadata in it.

    If it cannot be read, UNREADABLE alone, and why: nothing is concluded from a card that nobody understood.
    """
    path = folder / README
    if not path.is_file():
        return None
    try:
        require_inside(folder, path)
        return _declared(decode(read_bytes(path, "", README_BYTES), README))
    except GemmaAwqError as error:
        return {UNREADABLE: error.message}


def _declared(text: str) -> dict[str, Any] | None:
    begin = _BEGIN.match(text)
    end = _END.search(text, begin.end()) if begin is not None else None
    if begin is None or end is None:
        return None
    if end.start() - begin.end() > METADATA_CHARACTERS:
        raise GemmaAwqError(f"The metadata of {README} has more than {METADATA_CHARACTERS} characters.")
    values = _mapping(text[begin.end() : end.start()])
    declared = {}
    for name in DECLARED:
        value = values.get(name)
        if value is None or value in _NOTHING:
            continue
        if not _is_text(value) and not (isinstance(value, list) and len(value) <= MOST and all(map(_is_text, value))):
            raise GemmaAwqError(f"{name} in the metadata of {README} is neither a text nor a short list of texts.")
        declared[name] = value
    return declared


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= LONGEST and value.isprintable()


def _mapping(text: str) -> dict[Any, Any]:
    """A YAML mapping whose scalars are all texts."""
    import yaml

    class Loader(yaml.BaseLoader):  # type: ignore[misc]
        """Knows no types but text, list and mapping, and no aliases."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("it uses an alias")
            return super().compose_node(parent, index)

    try:
        value = yaml.load(text, Loader)
    except RecursionError:
        raise GemmaAwqError(f"The metadata of {README} is nested too deeply.") from None
    except (yaml.YAMLError, ValueError, TypeError) as error:  # a list as the key of a mapping is a TypeError
        said = getattr(error, "problem", None) or first_line(error)
        raise GemmaAwqError(f"The metadata of {README} is not valid YAML: {said}.") from None
    if not isinstance(value, dict):
        raise GemmaAwqError(f"The metadata of {README} is no list of names and values.")
    return value
