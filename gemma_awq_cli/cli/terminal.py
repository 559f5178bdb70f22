"""What a terminal would obey rather than show, made visible: escape sequences, control characters, invisible letters.

Every character is looked at by itself, so a sequence that arrives in pieces is no different from one that arrives
whole. What is made visible looks as Python writes it: `\\x1b`, `\\u202e`.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Iterable

# Letters and marks that show nothing, beside Unicode's own format characters (Cf): fillers and variation selectors.
_EMPTY = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u3164\uffa0") | frozenset(
    map(chr, (*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)))
)
# What the progress bars of libraries move with: to the line's start, and a line up.
_MOVES = re.compile(r"(\r|\x1b\[A)")
LONGEST_MESSAGE = 4000


def escaped(character: str) -> str:
    """A character as Python writes it; the byte that it stands for, if it came from a name that is no UTF-8."""
    code = ord(character)
    if character in "\n\r\t":
        return repr(character)[1:-1]
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _escaped_in_json(character: str) -> str:
    return json.dumps(character)[1:-1]


class _Shown(dict[int, str]):
    """For `str.translate`: character by character what is shown, found out once. kept: shown as it is in any case."""

    def __init__(
        self, categories: Iterable[str], empty: frozenset[str], kept: str, escape: Callable[[str], str] = escaped
    ) -> None:
        super().__init__()
        self._categories, self._empty, self._kept = frozenset(categories), empty, kept
        self._escape = escape

    def __missing__(self, code: int) -> str:
        character = chr(code)
        obeyed = character in self._empty or unicodedata.category(character) in self._categories
        self[code] = shown = self._escape(character) if obeyed and character not in self._kept else character
        return shown


# Cc: control characters, C1 and DEL included; Cs: bytes of a name that are no UTF-8, and other halves of surrogate
# pairs; Cf: format characters such as right-to-left overrides and zero-width spaces; Zl, Zp: separators of lines.
_CONTENT = _Shown(("Cc", "Cs"), frozenset(), "\n\t")
_MESSAGE = _Shown(("Cc", "Cs", "Cf", "Zl", "Zp"), _EMPTY, "\n\t")
_LINE = _Shown(("Cc", "Cs", "Cf", "Zl", "Zp"), _EMPTY, "")
_JSON = _Shown(("Cc", "Cs", "Cf", "Zl", "Zp"), _EMPTY, "\n\t", _escaped_in_json)


def content(text: str) -> str:
    """What a model wrote: nothing is obeyed; what languages need to be written, joiners and directions, stays."""
    return text.replace("\r\n", "\n").translate(_CONTENT)


def message(text: str) -> str:
    """A text that quotes names: nothing is obeyed, and nothing is invisible. Line ends stay."""
    return text.replace("\r\n", "\n").translate(_MESSAGE)


def shortened(text: str) -> str:
    """A message of bounded length, whatever it quotes: its beginning and its end."""
    if len(text) <= LONGEST_MESSAGE:
        return text
    half = LONGEST_MESSAGE // 2
    return f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"


def line(text: str) -> str:
    """As `message`, in one line: a name must not look like two."""
    return text.translate(_LINE)


def library(text: str) -> str:
    """What a library writes to the terminal by itself: its progress bars may move, nothing else is obeyed."""
    return "".join(part if _MOVES.fullmatch(part) else part.translate(_MESSAGE) for part in _MOVES.split(text))


def json_escaped(document: str) -> str:
    """A JSON text that means the same, with JSON's escapes for all that a terminal would obey or not show."""
    return document.translate(_JSON)
