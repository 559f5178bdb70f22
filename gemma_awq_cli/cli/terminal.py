"""Make visible what a terminal would obey or hide: escape sequences, control characters, invisible letters.

Every character is judged alone, so a sequence that arrives in pieces is treated like one that arrives whole. Characters
are made visible as Python escapes: `\\x1b`, `\\u202e`.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Iterable

# Letters and marks without a glyph that are not in Unicode's format category (Cf): fillers and variation selectors.
_EMPTY = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u3164\uffa0") | frozenset(
    map(chr, (*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)))
)
# The cursor movements of the libraries' progress bars: to the start of the line, and one line up.
_MOVES = re.compile(r"(\r|\x1b\[A)")
LONGEST_MESSAGE = 4000


def escaped(character: str) -> str:
    """Return a character's Python escape, or that of the byte it stands for in a file name that is not UTF-8."""
    code = ord(character)
    if character in "\n\r\t":
        return repr(character)[1:-1]
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _escaped_in_json(character: str) -> str:
    return json.dumps(character)[1:-1]


class _Shown(dict[int, str]):
    """A table for `str.translate`, filled as characters are met. kept: characters that are never escaped."""

    def __init__(
        self, categories: Iterable[str], empty: frozenset[str], kept: str, escape: Callable[[str], str] = escaped
    ) -> None:
        super().__init__()
        self._categories, self._empty, self._kept = frozenset(categories), empty, kept
        self._escape = escape

    def __missing__(self, code: int) -> str:
        character = chr(code)
        hidden = character in self._empty or unicodedata.category(character) in self._categories
        self[code] = shown = self._escape(character) if hidden and character not in self._kept else character
        return shown


# Cc: control characters, including C1 and DEL; Cs: bytes of a name that is not UTF-8, and halves of surrogate pairs;
# Cf: format characters such as right-to-left overrides and zero-width spaces; Zl, Zp: line and paragraph separators.
_CONTENT = _Shown(("Cc", "Cs"), frozenset(), "\n\t")
_MESSAGE = _Shown(("Cc", "Cs", "Cf", "Zl", "Zp"), _EMPTY, "\n\t")
_LINE = _Shown(("Cc", "Cs", "Cf", "Zl", "Zp"), _EMPTY, "")
_JSON = _Shown(("Cc", "Cs", "Cf", "Zl", "Zp"), _EMPTY, "\n\t", _escaped_in_json)


def content(text: str) -> str:
    """Return a model's text with control characters escaped. Joiners and directions, which languages need, stay."""
    return text.replace("\r\n", "\n").translate(_CONTENT)


def message(text: str) -> str:
    """Return a text that quotes names, with control and invisible characters escaped. Line ends stay."""
    return text.replace("\r\n", "\n").translate(_MESSAGE)


def shortened(text: str) -> str:
    """Return a message of bounded length, whatever it quotes: its beginning and its end."""
    if len(text) <= LONGEST_MESSAGE:
        return text
    half = LONGEST_MESSAGE // 2
    return f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"


def line(text: str) -> str:
    """Like `message`, on one line: line ends and tabs are escaped too, so that one name never looks like two."""
    return text.translate(_LINE)


def library(text: str) -> str:
    """Return what a library writes to the terminal, with everything escaped but the movements of progress bars."""
    return "".join(part if _MOVES.fullmatch(part) else part.translate(_MESSAGE) for part in _MOVES.split(text))


def json_escaped(document: str) -> str:
    """Return an equivalent JSON text, with JSON escapes for what a terminal would obey or hide."""
    return document.translate(_JSON)
