"""`gemma-awq rm`: remove what this tool wrote."""

import sys
from typing import Annotated

import typer

from gemma_awq_cli.cli.console import Output
from gemma_awq_cli.cli.list_models import about
from gemma_awq_cli.cli.options import QuietOption
from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.system.sizes import format_bytes

EXAMPLES = """
gemma-awq rm ./gemma-3-270m-AWQ
gemma-awq rm cache:gemma-3-270m cache:native --yes
"""


def command(
    names: Annotated[list[str], typer.Argument(help="Names that `list` shows.", metavar="NAME")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove without asking for confirmation.")] = False,
    quiet: QuietOption = False,
) -> None:
    """Remove artifacts, exports, unfinished work, or parts of the cache.

    Removes only what this tool wrote. A folder with other files or links in it stays as it is, and so does one that a
    process is writing or, on Linux, has loaded.
    """
    out = Output(quiet)
    from gemma_awq_cli.inventory.finding import find
    from gemma_awq_cli.inventory.removal import remove, require_removable

    found = list({entry.path: entry for entry in map(find, names)}.values())
    for entry in found:
        require_removable(entry)
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError(
                "Removing needs your confirmation, and standard input is not a terminal.",
                "Look at it with `gemma-awq show`, then remove it with --yes.",
            )
        Output().table("", [(entry.name, format_bytes(entry.bytes), about(entry)) for entry in found])
        if not out.confirm(f"Remove {'this' if len(found) == 1 else f'these {len(found)}'}?"):
            raise GemmaAwqError("Nothing was removed.", "Answer y, or remove with --yes.")
    for entry in found:
        remove(entry)
        out.note(f"Removed {entry.name}, {format_bytes(entry.bytes)}.")
