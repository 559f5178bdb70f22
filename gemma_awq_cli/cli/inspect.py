"""`gemma-awq inspect`: say what a model is, from the headers of its files."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemma_awq_cli.cli.console import Output
from gemma_awq_cli.cli.default_model import MODEL_VARIABLE, default_model
from gemma_awq_cli.cli.options import JsonOption, QuietOption, RevisionOption
from gemma_awq_cli.errors import UsageError

if TYPE_CHECKING:
    from gemma_awq_cli.inspection.compare import Comparison
    from gemma_awq_cli.inspection.contents import Contents
    from gemma_awq_cli.inspection.facts import ModelFacts

EXAMPLES = """
gemma-awq inspect ./my-awq
gemma-awq inspect google/gemma-3-1b-it --json
gemma-awq inspect ./my-awq --compare OWNER/other-AWQ
gemma-awq inspect model-Q4_K_M.gguf
"""


# fmt: off
def command(
    model: Annotated[str | None, typer.Argument(
        help="Checkpoint folder, hub id, GGUF file or adapter folder.  "
        f"[default: {MODEL_VARIABLE}, else the last artifact]", metavar="MODEL", show_default=False)] = None,
    compare: Annotated[str | None, typer.Option(
        help="List what differs from the model OTHER instead.", metavar="OTHER")] = None,
    qat_grid: Annotated[bool, typer.Option(
        "--qat-grid", help="Look for the 4-bit grid of quantization-aware training. Reads some rows of every "
        "weight.")] = False,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    # fmt: on
    """Say what a model is: family, format, who made it, what reads it, and what is wrong with it.

    Reads headers and small files only, also of a model on the hub. Works on broken checkpoints and other programs'
    formats: problems are listed with a hint, and the exit code is 0 unless nothing can be read.
    """
    out = Output(quiet)
    if qat_grid and compare is not None:
        raise UsageError("--qat-grid and --compare cannot be combined.", "Leave out one of them.")
    asked = model or default_model(out)
    from gemma_awq_cli.inspection.model import find_contents, inspect_contents, with_qat_grid
    from gemma_awq_cli.inspection.table import comparison_sections, sections

    contents = find_contents(asked, revision, out.note)
    for note in contents.notes:
        out.note(note)
    facts = inspect_contents(contents)
    if compare is not None:
        other = find_contents(compare, None, out.note)
        found = _compared(out, (contents, other), (facts, inspect_contents(other)))
        _show(out, as_json, found.document, lambda: comparison_sections(found))
        return
    if qat_grid:
        facts = with_qat_grid(facts, contents)
    _show(out, as_json, facts.document, lambda: sections(facts))


def _compared(
    out: Output, contents: "tuple[Contents, Contents]", facts: "tuple[ModelFacts, ModelFacts]"
) -> "Comparison":
    from gemma_awq_cli.inspection.compare import compare
    from gemma_awq_cli.inspection.table import comparable

    with out.progress("MB compared", 1) as bar:

        def advance(done: int, total: int) -> None:
            bar.set(done // 10**6, max(1, total // 10**6))

        return compare(*contents, facts, comparable, advance)


def _show(out: Output, as_json: bool, document: Callable[[], dict[str, Any]], rows: Callable[[], Any]) -> None:
    if as_json:
        out.document(document())
    else:
        out.result_facts(rows())
