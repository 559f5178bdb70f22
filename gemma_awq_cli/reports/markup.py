"""Strangers' text for a Markdown page: put on one line, and escaped so that it can only be text.

`Markdown` marks what is Markdown on purpose; `markdown_template` escapes everything else that a template puts in, so
that no place can forget to.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any

_BIDI = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # characters that change the direction of text
_UNSEEN = re.compile(f"[\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff{_BIDI}]+")
_SURROGATES = re.compile("[\ud800-\udfff]")
# What is markup anywhere in a line. An underscore is not inside a word.
_ACTIVE = re.compile(r"[\\`*\[\]<>|&$~]|(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])")
_LEADING = re.compile(r"\A(?:#(?=#{0,5}(?:\s|\Z))|[-+](?=\s)|(?P<number>\d{1,9})(?P<dot>[.)])(?=\s|\Z))")
# GitHub and the hub turn bare addresses and names into links and mentions
_LINKED = re.compile(r":(?=//)|(?<=\bwww)\.|@", re.IGNORECASE)


class Markdown(str):
    """Text that is Markdown on purpose."""

    __slots__ = ()


def one_line(text: str, limit: int | None = None) -> str:
    """Return text without line breaks, control characters and half surrogates, at most `limit` characters of it."""
    line = _UNSEEN.sub(" ", _SURROGATES.sub("\ufffd", text)).strip()
    return line if limit is None or len(line) <= limit else f"{line[:limit]}..."


def escape(text: object) -> Markdown:
    """Return any value as one line of Markdown text; `Markdown` stays as it is."""
    if isinstance(text, Markdown):
        return text
    line = _ACTIVE.sub(r"\\\g<0>", one_line(str(text)))
    line = _LEADING.sub(lambda m: f"{m['number']}\\{m['dot']}" if m["number"] else f"\\{m[0]}", line)
    return Markdown(_LINKED.sub(r"\\\g<0>", line))


def code(text: object) -> Markdown:
    """Return a code span that its text cannot end, also in the cell of a table."""
    line = one_line(str(text)).replace("|", "\\|")
    longest = max(map(len, re.findall("`+", line)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if longest or not line.strip() else ""
    return Markdown(f"{fence}{pad}{line}{pad}{fence}")


@cache
def markdown_template(path: Path) -> Any:
    """Return one of our own Markdown templates, compiled by jinja2: it escapes everything that is not `Markdown`."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
        autoescape=True, finalize=lambda value: Markup(escape(value)),
    )  # fmt: skip
    environment.filters["code"] = code
    return environment.from_string(path.read_text(encoding="utf-8"))
