"""How `--help` looks: options in groups with headings, whole summaries, and examples at the end.

Typer without rich writes all options in one list, cuts summaries off with "..." and names types as Python does.
"""

import inspect
import re
from typing import Any

from typer.core import TyperCommand, TyperGroup

WIDTH = 100  # columns at most; a terminal with fewer gets as many as it has, and a pipe 80
FIRST_COLUMN = 30  # an option that is longer has its help on the next line
REST = "Options"  # the heading of options that name none, always the last one
# What stands for a value whose option declares no placeholder, by the name that Typer gives to its type.
PLACEHOLDERS = {"int": "N", "float": "X", "str": "TEXT", "path": "PATH", "file": "FILE", "directory": "DIR"}


class CommandHelp(TyperCommand):
    """A command whose options lie in groups (`rich_help_panel`) and whose epilog is a list of examples."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The usage line with `REPO_ID` for a required argument, where Typer writes `{REPO_ID}`."""
        return [re.sub(r"^\{(.*)\}(\.\.\.)?$", r"\1\2", piece) for piece in super().collect_usage_pieces(ctx)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        _write_lists(formatter, parameters_by_heading(self, ctx))

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        _write_examples(formatter, self.epilog)

    def get_short_help_str(self, limit: int = 0) -> str:
        """The first paragraph of the help, whole."""
        return " ".join(inspect.cleandoc(self.help or "").partition("\n\n")[0].split())


class GroupHelp(TyperGroup):
    """The program itself: its commands come before its options."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        commands = [(name, self.commands[name].get_short_help_str()) for name in self.list_commands(ctx)]
        _write_lists(formatter, {"Commands": commands})
        _write_lists(formatter, parameters_by_heading(self, ctx))

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        _write_examples(formatter, self.epilog)


def parameters_by_heading(command: Any, ctx: Any) -> dict[str, list[tuple[str, str]]]:
    """The help of arguments and options by heading, in the order of their declarations."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.get_params(ctx):
        record = parameter.get_help_record(ctx)
        if record is None:
            continue
        if parameter.param_type_name == "argument":
            heading, record = "Arguments", (re.sub(r" <.*>$", "", record[0]), record[1])
        else:
            heading = getattr(parameter, "rich_help_panel", None) or REST
        groups.setdefault(heading, []).append((_with_placeholder(record[0]), _with_plain_bounds(record[1])))
    if REST in groups:
        groups[REST] = groups.pop(REST)
    return groups


def _with_placeholder(option: str) -> str:
    """`--seed <int>` -> `--seed N`, `--head <int8|int4>` -> `--head int8|int4`."""

    def placeholder(match: re.Match[str]) -> str:
        name = re.sub(r"^list\[(.*)\]$", r"\1", match[1]).removesuffix(" range")
        return PLACEHOLDERS.get(name, name)

    return re.sub(r"<([^<>]+)>$", placeholder, option)


def _with_plain_bounds(text: str) -> str:
    """`Text.  [env var: V; default: a]  [x>=1]` -> `Text.  [default: a; at least 1; env var: V]`."""
    text = re.sub(r"\]\s+\[", "; ", text)
    text = re.sub(r"(env var: \w+); ([^]]*)\]$", r"\2; \1]", text)
    text = re.sub(r"([\d.]+)<=x<=([\d.]+)", r"\1 to \2", text)
    text = re.sub(r"\bx>=([\d.]+)", r"at least \1", text)
    return re.sub(r"\b(\d+)\.0(?=\]|;| to )", r"\1", text)


def _write_lists(formatter: Any, groups: dict[str, list[tuple[str, str]]]) -> None:
    """Every group under its heading, with the second columns of all of them aligned."""
    widths = [len(first) for rows in groups.values() for first, _ in rows]
    column = max((width for width in widths if width <= FIRST_COLUMN), default=FIRST_COLUMN)
    for heading, rows in groups.items():
        with formatter.section(heading):
            formatter.write_dl([(first.ljust(column), second) for first, second in rows], col_max=column)


def _write_examples(formatter: Any, examples: str | None) -> None:
    """One command per line; a long one continues after a backslash, so that it can be copied."""
    if examples:
        with formatter.section("Examples"):
            for line in examples.strip().splitlines():
                first, *more = _broken(line.strip(), formatter.width - 2 * formatter.indent_increment)
                formatter.write(f"{'':>{formatter.current_indent}}{first}\n")
                for part in more:
                    formatter.write(f"{'':>{formatter.current_indent + formatter.indent_increment}}{part}\n")


def _broken(command: str, width: int) -> list[str]:
    """A command line in parts of at most `width` columns, if it has enough options to break before."""
    parts: list[str] = []
    for option in re.split(r" (?=--?[a-z])", command):
        if parts and len(f"{parts[-1]} {option} \\") <= width:
            parts[-1] += f" {option}"
        else:
            parts.append(option)
    return [f"{part} \\" for part in parts[:-1]] + parts[-1:]
