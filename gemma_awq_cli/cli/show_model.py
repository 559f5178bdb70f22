"""`gemma-awq show`: what one of the things on the disk is, and how it was made."""

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemma_awq_cli.cli.console import Output
from gemma_awq_cli.cli.default_model import last_artifact_folder
from gemma_awq_cli.cli.options import OUTPUT, JsonOption, QuietOption
from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.system.saving import local_path
from gemma_awq_cli.system.sizes import format_bytes

if TYPE_CHECKING:
    from gemma_awq_cli.inventory.entries import Entry

EXAMPLES = """
gemma-awq show
gemma-awq show ./gemma-3-270m-AWQ --json
gemma-awq show ./gemma-3-270m-AWQ --html -o report.html
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
    as_html: Annotated[
        bool,
        typer.Option(
            "--html",
            help="Write its report, and its bench if that was saved, as an HTML page (extra `report`).",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Where to write the page.  [default: the artifact's name and .html]",
            metavar="FILE.html",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show what an artifact is, how it was made, its files and their sizes.

    `inspect` says what any other model is, and what reads it.
    """
    out = Output(quiet)
    if as_html and as_json:
        raise UsageError("--html and --json exclude each other.", "Give one.")
    if output is not None and not as_html:
        raise UsageError("--output says where the page goes.", "Add --html.")
    from gemma_awq_cli.inventory.finding import find
    from gemma_awq_cli.inventory.folders import files_of

    entry = find(name if name is not None else str(last_artifact_folder(out, "artifact")))
    if as_html:
        out.result(str(_write_page(out, entry, output)))
        return
    files = [] if entry.kind == "hub" else files_of(entry.path)  # a cache names files by their hashes
    if as_json:
        out.document({**entry.document, "files": [{"name": file, "bytes": size} for file, size in files]})
        return
    listed = [(file, format_bytes(size)) for file, size in files]
    out.result_facts([("", _facts(entry)), *([("Fidelity", _fidelity(entry))] if "kl" in entry.facts else [])])
    if listed:
        out.result_table("", listed, ("file", "size"))


def _write_page(out: Output, entry: "Entry", output: Path | None) -> Path:
    """Write the page of an artifact; return the file."""
    from gemma_awq_cli.inventory.entries import Kind
    from gemma_awq_cli.pages.report_page import ELSEWHERE, write_report_page

    if entry.kind is not Kind.artifact:
        raise GemmaAwqError(f"{entry.name} is no artifact, so it has no report.", "Name an artifact that `list` shows.")
    target = local_path(output if output is not None else Path(f"{entry.path.name}.html"), ELSEWHERE)
    write_report_page(entry.path, target, lambda event: out.warning(event.text))
    return target


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
