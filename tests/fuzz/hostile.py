"""Values that programs stumble over, in a form that a line of JSON can hold.

A dict with one key that begins with `$` stands for what JSON cannot say or what would be long: `{"$repeat": ["x", 9]}`
is a text of nine x, `{"$raw": "NaN"}` is those characters in a JSON file, `{"$hex": "ff"}` is bytes.
"""

import json
import random
from typing import Any

CANARY = "canary-7f3a-of-the-file-outside"  # stands in a file that no model may lead to
SCRIPT = "<script>alert(1)</script>"

NUMBERS: list[Any] = [
    0, 1, -1, 2, 3, 7, True, False, 2.5, 0.0, -0.5, 1e-300, 1e308, 255, 2**15, 2**16 + 1, 10**6, 10**8, 2**31 - 1,
    2**31, -(2**31), 2**32, 2**32 + 1, 2**53 + 1, 2**63, 2**64, 10**30, {"$raw": "NaN"}, {"$raw": "Infinity"},
    {"$raw": "-Infinity"}, {"$raw": "1e999"}, {"$digits": 5000},
]  # fmt: skip
TEXTS: list[Any] = [
    "", " ", "x", {"$repeat": ["x", 10000]}, "\ud800", "\x1b]0;title\x07", "\x1b[31mred\x1b[0m", "a\x00b", "a\nb\r\nc",
    "\x9b31m", "../outside", "../outside/secret.txt", "/etc/passwd", "~nobody/x", "..", ".", "/", "a/b/c",
    SCRIPT, "\"><img src=x onerror=alert(1)>", "' onmouseover='alert(1)", "$HOME", r"$\frac{1}{", "`id`",
    "```\nid\n```", "| a | b |", "[x](javascript:alert(1))", "%s%n%d", "{{ 7 * 7 }}", "{0.__class__}", "bfloat16",
    "float16", "float64", "float8_e4m3fn", "auto", "None", "true", "-1", "1e5", "中" * 50, "a\u2028b", "a\u0085b",
    "\ufeffx", "\u202egpj", "gelu", "relu", "demo", "C:\\x", "file:///etc/passwd", "http://localhost:1/x",
]  # fmt: skip
CONTAINERS: list[Any] = [
    None, [], {}, [[]], [None], [{}], {"": None}, ["x", "y"], [1, 2, 3], [-1], {"a": {"b": {}}}, {"$nest": 70},
    {"$nest": 3000}, {"$nest": 100000}, {"$repeat": [[0], 5000]},
]  # fmt: skip


def value(rng: random.Random, old: Any = None) -> Any:
    """Something for the place of `old`: near it, of another type, or far from everything."""
    if rng.random() < 0.35 and (near := neighbours(old)):
        return rng.choice(near)
    return rng.choice(rng.choice([NUMBERS, NUMBERS, TEXTS, CONTAINERS]))


def neighbours(old: Any) -> list[Any]:
    """What differs from a value by little, or only by its type."""
    if isinstance(old, bool):
        return [not old, int(old), str(old), None]
    if isinstance(old, int):
        return [
            old + 1,
            old - 1,
            old * 2,
            old // 2,
            -old,
            str(old),
            float(old),
            [old],
            old + 2**32,
            old + 2**64,
            old * 10**6,
        ]
    if isinstance(old, float):
        return [-old, old * 2, int(old) if abs(old) < 1e18 else 0, str(old), 0.0, old * 1e30, [old]]
    if isinstance(old, str):
        return [old.upper(), old + " ", old[:-1], "x" + old, old + "\n", old * 2, [old], {"content": old}]
    if isinstance(old, list):
        return [old[:-1], old * 2, old[::-1], [old], dict(enumerate(map(str, old))), old[:1] * 300, [None] * len(old)]
    if isinstance(old, dict):
        return [list(old), list(old.values()), {"x": old}, str(sorted(old))]
    return []


def plain(coded: Any) -> Any:
    """The value that is meant, as Python has it; text that only JSON could hold stays text."""
    if isinstance(coded, dict) and len(coded) == 1:
        name, what = next(iter(coded.items()))
        if name == "$repeat":
            return plain(what[0]) * what[1]
        if name == "$raw":
            return what
        if name == "$digits":
            return "9" * what
        if name == "$nest":
            return "[" * what + "]" * what
        if name == "$hex":
            return bytes.fromhex(what)
    return coded


def to_json(document: Any) -> str:
    """JSON text of a document in which coded values stand anywhere."""
    pieces: list[str] = []

    def coded(item: Any) -> Any:
        if isinstance(item, dict):
            if len(item) == 1 and next(iter(item)) in ("$raw", "$digits", "$nest"):
                pieces.append(plain(item))
                return f"\x00piece{len(pieces) - 1}\x00"
            if len(item) == 1 and next(iter(item)) in ("$repeat", "$hex"):
                found = plain(item)
                return found.decode("latin-1") if isinstance(found, bytes) else found
            return {str(name): coded(one) for name, one in item.items()}
        return [coded(one) for one in item] if isinstance(item, list) else item

    text = json.dumps(coded(document), indent=1)
    for index, piece in enumerate(pieces):
        text = text.replace(json.dumps(f"\x00piece{index}\x00"), piece)
    return text


def to_bytes(coded: Any) -> bytes:
    """A coded text or bytes as a file holds them."""
    found = plain(coded)
    if isinstance(found, bytes):
        return found
    text = found if isinstance(found, str) else to_json(found)
    return text.encode("utf-8", "surrogatepass")
