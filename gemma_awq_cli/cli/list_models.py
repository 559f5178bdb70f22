"""`gemma-awq list`: what this tool has on the disk."""

from typing import TYPE_CHECKING, Annotated

import typer

from gemma_awq_cli.cli.console import Output
from gemma_awq_cli.cli.options import JsonOption, QuietOption
from gemma_awq_cli.system.sizes import format_bytes

if TYPE_CHECKING:
    from gemma_awq_cli.inventory.entries import Entry

EXAMPLES = """
gemma-awq list
gemma-awq list ~/models
gemma-awq list --json
"""


def command(
    folders: Annotated[
        list[str] | None,
        typer.Argument(
            help="Folders to look in.  [default: the current one, those that were written last, and the caches]",
            metavar="DIR",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """List artifacts, exports, unfinished work and cached models, with their sizes.

    Of the hub's cache, which other programs use too, it shows the Gemmas.
    """
    out = Output(quiet)
    from gemma_awq_cli.inventory.finding import find_all, find_in

    found = find_in(folders) if folders else find_all()
    if as_json:
        out.document({"entries": [entry.document for entry in found]})
    elif found:
        rows = [(entry.name, entry.kind.value, format_bytes(entry.bytes), about(entry)) for entry in found]
        out.result_table("", rows, ("name", "kind", "size", ""), words=(0, 1, 3))
    if not found:
        out.note("There is nothing here. `gemma-awq quantize` makes an artifact.")


def about(entry: "Entry") -> str:
    """Return what is worth knowing of an entry, in a few words."""
    facts = entry.facts
    if entry.problem is not None:
        return f"damaged: {entry.problem}"
    if entry.kind == "artifact":
        return f"{facts['model']}, {facts['bits']} bits in groups of {facts['group_size']}, KL {facts['kl']:.4f}"
    if entry.kind == "export":
        return f"{facts['model']} as {facts['format']}"
    if entry.kind == "unfinished":
        return "what an interrupted run left; continue it with --resume"
    if entry.kind == "cache":
        return str(facts["about"])
    return "quantized" if facts["quantized"] else "16-bit"
