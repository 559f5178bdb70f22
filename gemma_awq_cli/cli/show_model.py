"""`gemma-awq show`: what one of the things on the disk is, and how it was made."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from gemma_awq_cli.cli.console import Output
from gemma_awq_cli.cli.default_model import last_artifact_folder
from gemma_awq_cli.cli.options import JsonOption, QuietOption
from gemma_awq_cli.system.sizes import format_bytes

if TYPE_CHECKING:
    from gemma_awq_cli.inventory.entries import Entry

EXAMPLES = """
gemma-awq show
gemma-awq show ./gemma-3-270m-AWQ --json
gemma-awq show cache:gemma-3-270m
"""
_LATEST = 253_402_300_799  # seconds: the end of the year 9999; a file may claim to be from later
# Facts that are worth a line, by the name that they have in the JSON.
_LABELS = {
    "model": "made from", "revision": "revision", "family": "family", "format": "format", "bits": "bits",
    "group_size": "group size", "quality": "quality", "calibration": "calibration", "finished": "finished",
    "gemma_awq": "made with gemma-awq", "about": "what it is",
}  # fmt: skip


def command(
    name: Annotated[
        str | None,
        typer.Argument(
            help="A name that `list` shows.  [default: the last artifact]", metavar="NAME", show_default=False
        ),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show what an artifact is, how it was made, its files and their sizes.

    `inspect` says what any other model is, and what reads it.
    """
    out = Output(quiet)
    from gemma_awq_cli.inventory.finding import find
    from gemma_awq_cli.inventory.folders import files_of

    entry = find(name if name is not None else str(last_artifact_folder(out, "artifact")))
    files = [] if entry.kind == "hub" else files_of(entry.path)  # a cache names files by their hashes
    if as_json:
        out.document({**entry.document, "files": [{"name": file, "bytes": size} for file, size in files]})
        return
    listed = [(file, format_bytes(size)) for file, size in files]
    out.result_facts([("", _facts(entry)), *([("Fidelity", _fidelity(entry))] if "kl" in entry.facts else [])])
    if listed:
        out.result_table("", listed, ("file", "size"))


def _facts(entry: "Entry") -> list[tuple[str, str]]:
    changed = datetime.fromtimestamp(min(max(entry.modified, 0), _LATEST), UTC).strftime("%Y-%m-%d %H:%M UTC")
    known = [(label, entry.facts.get(name)) for name, label in _LABELS.items()]
    return [
        ("kind", entry.kind.value),
        ("path", str(entry.path)),
        ("size", format_bytes(entry.bytes)),
        ("changed", changed),
        *((label, str(value)) for label, value in known if value is not None),
        *([("problem", entry.problem)] if entry.problem is not None else []),
    ]


def _fidelity(entry: "Entry") -> list[tuple[str, str]]:
    facts = entry.facts
    return [
        ("KL divergence, nats per token", f"{facts['kl']:.4f}"),
        ("perplexity, 16-bit and 4-bit", f"{facts['perplexity_16bit']:.2f}, {facts['perplexity_4bit']:.2f}"),
        ("top-1 agreement", f"{facts['top1_agreement']:.1%}"),
    ]
