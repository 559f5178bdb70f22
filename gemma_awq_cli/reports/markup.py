"""Text of strangers on its way into Markdown: made one line, and escaped so that it can be nothing but text.

`Markdown` marks what is written as Markdown on purpose; `markdown_environment` escapes everything else that a template
puts in, so that no place can forget to.
"""

import re
from typing import Any

_BIDI = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # they reorder what is shown
_UNSEEN = re.compile(f"[\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff{_BIDI}]+")
_SURROGATES = re.compile("[\ud800-\udfff]")
# What is markup anywhere in a line, and an underscore that is not inside a word, where it is no emphasis
_ACTIVE = re.compile(r"[\\`*\[\]<>|&$~]|(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])")
_LEADING = re.compile(r"\A(?:#(?=#{0,5}(?:\s|\Z))|[-+](?=\s)|(?P<number>\d{1,9})(?P<dot>[.)])(?=\s|\Z))")
# GitHub's and the hub's readers make links and mentions of bare text
_LINKED = re.compile(r":(?=//)|(?<=\bwww)\.|@", re.IGNORECASE)


class Markdown(str):
    """Text that is Markdown already."""

    __slots__ = ()


def one_line(text: str, limit: int | None = None) -> str:
    """Text without line breaks, control characters and half surrogates, and at most `limit` characters of it."""
    line = _UNSEEN.sub(" ", _SURROGATES.sub("\ufffd", text)).strip()
    return line if limit is None or len(line) <= limit else f"{line[:limit]}..."


def escape(text: object) -> Markdown:
    """Anything as text of one line of Markdown."""
    if isinstance(text, Markdown):
        return text
    line = _ACTIVE.sub(r"\\\g<0>", one_line(str(text)))
    line = _LEADING.sub(lambda m: f"{m['number']}\\{m['dot']}" if m["number"] else f"\\{m[0]}", line)
    return Markdown(_LINKED.sub(r"\\\g<0>", line))


def code(text: object) -> Markdown:
    """A code span that its text cannot end, in a table's cell as well."""
    line = one_line(str(text)).replace("|", "\\|")
    longest = max(map(len, re.findall("`+", line)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if longest or not line.strip() else ""
    return Markdown(f"{fence}{pad}{line}{pad}{fence}")


def markdown_environment() -> Any:
    """A jinja2 environment for our own Markdown templates: whatever is not `Markdown` is escaped."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
        autoescape=True, finalize=lambda value: Markup(escape(value)),
    )  # fmt: skip
    environment.filters["code"] = code
    return environment
