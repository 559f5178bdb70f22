"""docs/commands.md, made from the help of every command.

`python -m tests.command_reference` writes it, the man pages and completions of `shell_files.py`, and docs/messages.md.
"""

from pathlib import Path

import typer.main

from gemma_awq_cli.cli.app import app
from tests import message_reference, shell_files

REFERENCE = Path(__file__).parent.parent / "docs" / "commands.md"
WIDTH = 98  # columns, whatever terminal writes the file
HEAD = """# Command reference

What `gemma-awq --help` and `gemma-awq COMMAND --help` print. The [pages](index.md) explain what they do.
This file is generated: after a change of the help, run `python -m tests.command_reference`.
"""


def command_reference() -> str:
    """The text of docs/commands.md."""
    program = typer.main.get_command(app)
    context = program.make_context("gemma-awq", [], resilient_parsing=True, terminal_width=WIDTH)
    parts = [HEAD, _section("gemma-awq", context.get_help())]
    for name in program.list_commands(context):
        command = program.get_command(context, name)
        inner = command.make_context(name, [], parent=context, resilient_parsing=True)
        parts.append(_section(f"gemma-awq {name}", inner.get_help()))
    return "\n".join(parts)


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n```text\n{text.rstrip()}\n```\n"


if __name__ == "__main__":
    REFERENCE.write_text(command_reference(), encoding="utf-8")
    shell_files.write()
    message_reference.REFERENCE.write_text(message_reference.message_reference(), encoding="utf-8")
