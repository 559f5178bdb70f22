"""Which merges of a tokenizer.json join two of some tokens: half a million of them are looked through in their text.

The library writes a merge as four lines: `[`, the two strings, `]`. A raw line break never stands in a JSON string, so
the lines tell where each string begins. numpy compares the first bytes of all strings at once; the few that may be
wanted are parsed. Merges written in any other way are all parsed, which takes longer.
"""

from collections.abc import Set

import msgspec
import numpy as np
import numpy.typing as npt

_LINES = 4  # of a merge
_WORD = 8  # bytes that are compared
_QUOTE, _COMMA, _OPENING, _BACKSLASH = b'",[\\'
_ONES = 0x0101010101010101  # a 1 in each byte of a word

Pairs = list[tuple[str, str]]
_Places = npt.NDArray[np.int64]


def merges_between(stored: msgspec.Raw, tokens: Set[str]) -> Pairs | None:
    """The merges of two of some tokens, in their order. stored: the JSON of all; None if it makes no sense."""
    try:
        text = memoryview(stored)
        if (found := _in_lines(text, tokens)) is None:
            found = _all(stored)
    except msgspec.MsgspecError:
        return None
    pairs = [(pair[0], pair[-1]) for pair in found if pair[0] in tokens and pair[-1] in tokens]
    return pairs if all(len(pair) == 2 for pair in found) else None


def _all(stored: msgspec.Raw) -> list[tuple[str, ...]]:
    if b"[" in bytes(memoryview(stored)[:64]).strip()[1:]:
        return list(msgspec.json.decode(stored, type=list[tuple[str, str]]))
    # as older versions of the library wrote them
    return [tuple(line.split(" ")) for line in msgspec.json.decode(stored, type=list[str])]


def _in_lines(text: memoryview, tokens: Set[str]) -> list[tuple[str, ...]] | None:
    """Merges among which are all that are wanted; None if the text is not in lines of the usual form."""
    characters = np.frombuffer(text, np.uint8)
    ends = np.flatnonzero(characters == ord("\n"))
    count = len(ends) // _LINES
    if not count or len(ends) != _LINES * count + 1:
        return None
    # the places of the line breaks after `[`, after the first string and its comma, and after the second string
    opened, first, second = (ends[line::_LINES][:count] for line in (1, 2, 3))
    indent = int(np.argmax(characters[opened[0] + 1 : first[0]] == _QUOTE))
    starts = opened + 1 + indent, first + 1 + indent
    usual = (
        (characters[opened - 1] == _OPENING)
        & (characters[first - 1] == _COMMA)
        & (characters[second - 1] == _QUOTE)
        & (characters[starts[0]] == _QUOTE)
        & (characters[starts[1]] == _QUOTE)
    )
    if not usual.all():
        return None
    # strings at the very end, which a word would reach beyond, cannot be: `"`, a line break and `]` follow each
    words = np.ndarray((len(characters) - _WORD + 1,), "<u8", text, strides=(1,))
    wanted = [_word(token) for token in tokens]
    rows = np.arange(count)
    for start in starts:
        rows = rows[_begin_like(words, np.minimum(start[rows] + 1, len(words) - 1), wanted)]
    return [
        msgspec.json.decode(b"[" + bytes(text[starts[0][row] : second[row]]) + b"]", type=tuple[str, str])
        for row in rows.tolist()
    ]


def _word(token: str) -> tuple[int, int]:
    """The first bytes of a token's JSON, after its opening quotation mark, as one number; and how many count."""
    stored = token.encode("utf-8", "surrogatepass") + b'"'
    return int.from_bytes(stored[:_WORD], "little"), min(len(stored), _WORD)


def _begin_like(words: npt.NDArray[np.uint64], places: _Places, wanted: list[tuple[int, int]]) -> npt.NDArray[np.bool_]:
    """Which strings begin like one that is wanted, or are written with an escape. places: of their first bytes."""
    begun = words[places]
    # a byte that is a backslash is 0 here, and only below a 0 does the subtraction set the highest bit of a small byte
    others = begun ^ np.uint64(_BACKSLASH * _ONES)
    found = (others - np.uint64(_ONES)) & ~others & np.uint64(0x80 * _ONES) != 0
    for size in range(1, _WORD + 1):
        values = np.unique(np.array([value for value, length in wanted if length == size], np.uint64))
        if len(values):
            # a binary search: there may be thousands of tokens
            part = begun & np.uint64((1 << 8 * size) - 1)
            at = np.minimum(np.searchsorted(values, part), len(values) - 1)
            found |= values[at] == part
    return found
