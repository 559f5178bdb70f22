"""Paths of a user's machine in JSON that others will read: finding them, and removing them.

Tokens and templates are treated differently: `/home` is a word of many vocabularies, and `~/` may stop a generation.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from gemma_awq_cli.models.checkpoints.hub import REPO_ID

# Folders that hold users' homes, or the disks of shared machines. Inside a text only these count, because many texts
# that are not paths contain a slash.
_HOMES = (
    r"(?:home|Users|root|mnt|media|tmp|var|opt|srv|data|private|Volumes|workspace|scratch|content|kaggle|gpfs|lustre"
    r"|nfs|net|export|usr|etc|dev|run|work|teamspace|fsx|efs|s3|datasets?|models?|checkpoints?|projects?|raid|ssd|hdd)"
)
_INSIDE = re.compile(
    rf"(?<![\w.\-/:<>\\}}])/{_HOMES}/[^\s\"'<>|,;)]+"
    r"|(?<![\w])file:/+[^\s\"'<>|]+"
    r"|(?<![\w.\-/~])~[\w.\-]*/[\w.][^\s\"'<>|]*"
    r"|(?<![A-Za-z0-9/])[A-Za-z]:(?:\\(?![nrt]\b)|/(?!/))[^\s\"'<>|:*?]+"
    r"|(?<![\\\w])\\\\[\w.$-]+\\[\w.$-][^\s\"'<>|]*"
)
_WHOLE = re.compile(
    r"file:.*|~[\w.\-]*(?:[/\\].*)?|[A-Za-z]:[\\/](?!/).*|\\\\\?\\.*|\\\\[^\\\s]+\\.*|/(?!/)[^\0\n<>]*[\w][^\0\n<>]*",
    re.IGNORECASE,
)
# The name of a model in these fields may be a relative path: out/my-secret-model
_NAMES = ("name_or_path", "_name_or_path")
# Fields whose texts are tokens, words or templates. `content` belongs to an added token.
_WORDS = frozenset(
    ("vocab", "merges", "added_tokens", "added_tokens_decoder", "content", "additional_special_tokens",
     "extra_special_tokens", "stop_strings", "chat_template", "pattern", "Regex", "String", "bad_words")
)  # fmt: skip
# Fields that name other files of the folder by absolute paths; a reader finds these files by itself
_FILES = re.compile(r".*_(?:file|path|dir|folder)")

Place = tuple[str, ...]


def is_local_path(text: str) -> bool:
    """Whether a text as a whole is an absolute path: POSIX, Windows, UNC, a home, or a file URL."""
    return len(text) > 1 and _WHOLE.fullmatch(text) is not None


def find_local_path(text: str) -> str | None:
    """The first path of a machine in a text, which may be the whole text."""
    return text if is_local_path(text) else mentioned_path(text)


def mentioned_path(text: str) -> str | None:
    """The first path of a machine inside a text."""
    found = _INSIDE.search(text)
    return found[0] if found is not None else None


def base_name(text: str) -> str:
    """A path's last part, for the paths of any system."""
    parts = [part for part in re.split(r"[/\\]+", re.sub(r"(?i)\Afile:", "", text)) if part not in ("", "~", ".", "..")]
    return parts[-1] if parts else "model"


def without_local_paths(value: Any) -> tuple[Any, list[str]]:
    """Return JSON without the folders of a machine, and the names of the fields that were changed.

    The name of a model keeps its last part, a field that names a file is left out, and any other path keeps its last
    part.
    """
    changed: list[str] = []
    return _cleaned(value, (), changed), changed


def local_paths(value: Any) -> Iterator[tuple[str, str]]:
    """Yield the name and the path of each field whose text is, or contains, a path of a machine."""
    for place, text in _texts(value, ()):
        if (path := _path_of(place, text)) is not None:
            yield ".".join(place), path


def _path_of(place: Place, text: str) -> str | None:
    key = place[-1] if place else ""
    if key in _NAMES and text and not REPO_ID.fullmatch(text) and re.search(r"[/\\]", text):
        return text
    if _is_word(place):  # a token may look like a path, but a comment in a template may contain one
        return mentioned_path(text) if key == "chat_template" else None
    return find_local_path(text)


def _is_word(place: Place) -> bool:
    return not _WORDS.isdisjoint(place) or (bool(place) and place[-1].endswith("_token"))


def _texts(value: Any, place: Place) -> Iterator[tuple[Place, str]]:
    if place[-1:] in (("vocab",), ("merges",)):  # half a million words and pairs
        return
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield (*place, key), key  # a key that a user chose can be a path too
            yield from _texts(item, (*place, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _texts(item, place if isinstance(item, str) else (*place, str(index)))


def _cleaned(value: Any, place: Place, changed: list[str]) -> Any:
    if place[-1:] in (("vocab",), ("merges",)):
        return value
    if isinstance(value, str):
        return _cleaned_text(value, place, changed)
    if isinstance(value, list):
        return [_cleaned(item, place, changed) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {}
    for key, item in value.items():
        below = (*place, key)
        if isinstance(item, str) and _FILES.fullmatch(key) and key not in _NAMES and is_local_path(item):
            changed.append(".".join(below))
            continue
        kept[key] = _cleaned(item, below, changed)
    return kept


def _cleaned_text(text: str, place: Place, changed: list[str]) -> str:
    path = _path_of(place, text)
    if path is None or _is_word(place):
        return text
    changed.append(".".join(place))
    if path == text:
        return base_name(text)
    return _INSIDE.sub(lambda found: base_name(found[0]), text)


def to_json(value: Any) -> bytes:
    """JSON as the tool writes it into files."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
