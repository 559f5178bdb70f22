"""Search files that are about to be published for what looks like a key, a token or a password.

Three searches, from certain to less certain: the forms in which providers issue keys, as a table; a value whose name
says that it is secret, or that stands where an address has a password; and, in JSON, text that looks random.
Vocabularies are full of odd words, so tokenizers are searched only for the first, and for passwords in addresses.

Why not a library: detect-secrets finds 24,000 secrets in 30,000 lines of a vocabulary and had its last release in 2024;
kingfisher and betterleaks are fast or thorough, but carry 16 to 29 MB of compiled code and let tokens pass whose
checksums they doubt. A false alarm can be edited away by hand; what was published by mistake cannot be taken back.
"""

import base64
import binascii
import html
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from urllib.parse import unquote

from gemma_awq_cli.publish.secret_forms import FORMS

_COMPILED = tuple((start, re.compile(re.escape(start) + rest), what) for start, rest, what in FORMS)

_ADDRESS = re.compile(r"://[^\s/:@\"'<>\\{}$()\[\],]*:([^\s/@\"'<>\\{}$()\[\],]{3,})@[\w.\[-]")
_QUERY = re.compile(
    r"[?&;](?:[\w.-]*(?:api[_-]?key|token|secret|passw(?:or)?d|pwd|signature|credential)|key|auth|sig|code)"
    r"=(?P<value>[^\s&\"'<>\\#]{12,})",
    re.IGNORECASE,
)
_BEARER = re.compile(r"\b(?:bearer|basic|token)\s+(?P<value>[A-Za-z0-9._~+/=-]{20,})", re.IGNORECASE)
_NETRC = re.compile(r"\bmachine\s+\S+\s+login\s+\S+\s+password\s+\S+|\blogin\s+\S+\s+password\s+(\S{6,})")
_NAMED = (
    r"passw(?:or)?d|passwd|pwd|passphrase|secret|api[_.-]?key|apikey|access[_.-]?key|account[_.-]?key|"
    r"shared[_.-]?access[_.-]?key|private[_.-]?key|signing[_.-]?key|encryption[_.-]?key|client[_.-]?secret|credentials?|"
    r"(?:api|auth|access|refresh|bearer|session|hub|hf|bot|id|deploy|personal)[_.-]?token"
)
_VALUE = r"[\"']?\s*(?:[:=]|=>|:=)\s*[\"']?(?P<value>[^\s\"'<>,;)}]{6,})"
_ASSIGNED = re.compile(rf"(?<![A-Za-z])(?:[\w.-]*[_.-])?(?:{_NAMED}){_VALUE}", re.IGNORECASE)
# Any kind of key, but also bos_token and the like
_KEYED = re.compile(rf"(?<![A-Za-z])(?:[\w.-]*[_.-])?(?:key|token){_VALUE}", re.IGNORECASE)
_HEXADECIMAL = re.compile(r"[0-9a-f]{32,}|[0-9A-F]{32,}")
_KEY = re.compile(
    rf"(?:.*[_.\-])?(?:{_NAMED})(?:[_.\-]?(?:id|value|hash|key))?|auth|token|key|.*(?:password|secret)", re.IGNORECASE
)
_KEY_CAMEL = re.compile(r".*(?:apiKey|ApiKey|accessKey|AccessKey|Secret|Token|Password|privateKey|PrivateKey)")
_RUN = re.compile(r"[A-Za-z0-9+/]{24,}")
_BASE64 = re.compile(r"[A-Za-z0-9+/]{32,}={0,2}")
_ESCAPE = re.compile(r"\\u00([0-7][0-9a-fA-F])|\\x([0-7][0-9a-fA-F])|\\([/\"])")
# Keys without a prefix: those of Telegram's and Discord's bots
_BOTS = re.compile(
    r"(?<![0-9A-Za-z])(?:[0-9]{8,10}:AA[\w-]{32,34}(?![\w-])|[MNO][\w-]{23,27}\.[\w-]{6}\.[\w-]{27,38}(?![\w-]))",
    re.ASCII,
)
_PRIVATE = re.compile(r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----")  # the one form that contains spaces
_LONG_WORD = re.compile(r"[^\s\"]{20,}")
_PLACEHOLDER = re.compile(
    r"[*xX.\-_]+|your[\w -]*|<.*>|\{.*\}|\$.*|none|null|true|false|changeme|example\w*", re.IGNORECASE
)


@dataclass(frozen=True)
class Found:
    """What was found and where, without the secret itself. place: a field or a line, "" if unknown."""

    what: str
    place: str


def find_secret(data: bytes, is_json: bool = False, vocabulary: bool = False) -> Found | None:
    """Return the first thing in a file that looks like a secret, None if nothing does.

    vocabulary: the file is a tokenizer's, and is searched only for the forms of providers' keys and for passwords in
    addresses. Sees through UTF-16 and UTF-32, escapes of JSON, HTML and URLs, and base64.
    """
    # keys are ASCII, to which UTF-16 and UTF-32 add nothing but zero bytes
    text = (data.replace(b"\0", b"") if b"\0" in data else data).decode("latin-1")
    if vocabulary:  # 33 MB of words, only a few of them as long as a key
        private = _PRIVATE.findall(text) if "-----BEGIN " in text else []
        text = "\n".join(private + _LONG_WORD.findall(text))
    plain = _plain(text)
    for reading in (text, plain) if plain != text else (text,):
        for start, what in _keys(reading):
            return Found(what, "" if vocabulary else _line(reading, start))
    if (match := _ADDRESS.search(plain)) is not None:
        return Found("a password in an address", _line(plain, match.start()))
    if any(True for word in _BASE64.findall(plain) for _ in _keys(_decoded(word))):
        return Found("a key in base64", "")
    if vocabulary:
        return None
    return _find_named(plain) or (_find_in_json(data) if is_json else None)


def _find_named(text: str) -> Found | None:
    """Search a text of any kind for values whose name says that they are secret."""
    for pattern, what in ((_BOTS, "a bot's token"), (_NETRC, "a login with its password")):
        if (match := pattern.search(text)) is not None:
            return Found(what, _line(text, match.start()))
    for pattern, what in (
        (_QUERY, "a key in an address"), (_BEARER, "an access token"), (_ASSIGNED, "a key or a password"),
    ):  # fmt: skip
        for match in pattern.finditer(text):
            if _is_random(match["value"]) or ("passw" in match[0].lower() and _is_password(match["value"])):
                return Found(what, _line(text, match.start()))
    for match in _KEYED.finditer(text):
        if _HEXADECIMAL.fullmatch(match["value"]) or any(map(looks_random, _RUN.findall(match["value"]))):
            return Found("a key", _line(text, match.start()))
    return None


def _find_in_json(data: bytes) -> Found | None:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):  # the code that uploads the file reports what is wrong with it
        return None
    for place, key, text in _fields(value, "", ""):
        if (_KEY.fullmatch(key) or _KEY_CAMEL.fullmatch(key)) and _may_be_secret(key, text):
            return Found("a key or a password", place)
        if any(looks_random(run) for run in _RUN.findall(text)):
            return Found("a random key", place)
    return None


def _plain(text: str) -> str:
    """Return a text with its escapes resolved."""
    if "\\" in text:
        text = _ESCAPE.sub(lambda m: m[3] or chr(int(m[1] or m[2], 16)), text)
    if "&#" in text:
        text = html.unescape(text)
    return unquote(text) if re.search(r"%[2-7][0-9a-fA-F]", text) else text


def _decoded(word: str) -> str:
    """Return the text that a base64 word encodes, "" if it is not text."""
    try:
        data = base64.b64decode(word + "=" * (-len(word) % 4), validate=True)
    except (binascii.Error, ValueError):
        return ""
    return data.decode("ascii", "ignore") if data.isascii() else ""


def _keys(text: str) -> Iterator[tuple[int, str]]:
    """Yield the position and the kind of everything that has the form of a provider's key."""
    for start, pattern, what in _COMPILED:
        if start not in text:
            continue
        for match in pattern.finditer(text):
            before = text[match.start() - 1 : match.start()]
            if before.isascii() and before.isalnum() and start[0].isalnum():
                continue
            if what == "a JSON web token" and not _is_jwt(match[0]):
                continue
            yield match.start(), what


def _is_jwt(text: str) -> bool:
    head = text.split(".")[0]
    try:
        value = json.loads(base64.urlsafe_b64decode(head + "=" * (-len(head) % 4)))
    except ValueError:
        return False
    return isinstance(value, dict) and not value.keys().isdisjoint(("alg", "enc", "typ", "kid"))


def _fields(value: Any, place: str, key: str) -> Iterator[tuple[str, str, str]]:
    """Yield each string of a JSON value: its place, its key, and the string."""
    if isinstance(value, str):
        yield place or "the text", key, value
    elif isinstance(value, list):
        for item in value:
            yield from _fields(item, place, key)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _fields(item, f"{place}.{name}".removeprefix("."), name)


def _may_be_secret(key: str, text: str) -> bool:
    if any(c.isspace() for c in text):
        return False
    is_password = re.search("passw|pwd", key, re.IGNORECASE) is not None
    return _is_random(text) or (is_password and _is_password(text))


def _is_password(text: str) -> bool:
    return len(text) >= 6 and _PLACEHOLDER.fullmatch(text) is None and any(not c.isalpha() for c in text)


def _is_random(text: str) -> bool:
    """Whether a value that is named a secret may be one: letters and digits, and not just a few different ones."""
    if _PLACEHOLDER.fullmatch(text) or len(text) < 8 or text.startswith(("<", "{", "$", "[")):
        return False
    return any(c.isdigit() for c in text) and any(c.isalpha() for c in text) and entropy(text) >= 2.75


def looks_random(word: str) -> bool:
    """Whether a word of letters and digits looks random: not like a word, an identifier, or a hexadecimal hash.

    In random text, six of ten characters differ in kind (upper case, lower case, digit) from the one before; in the
    longest class names, three do.
    """
    if entropy(word) < 3.8 or sum(c.isdigit() for c in word) < 2:
        return False
    kinds = ["d" if c.isdigit() else "u" if c.isupper() else "l" if c.islower() else "s" for c in word]
    changes = sum(a != b for a, b in pairwise(kinds))
    return {"d", "u", "l"} <= set(kinds) and changes >= 0.36 * len(word)


def entropy(text: str) -> float:
    """Return the Shannon entropy in bits per character."""
    return -sum(n / len(text) * math.log2(n / len(text)) for n in Counter(text).values())


def _line(text: str, position: int) -> str:
    return f"line {text.count(chr(10), 0, position) + 1}"
