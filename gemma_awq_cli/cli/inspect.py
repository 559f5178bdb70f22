"""`gemma-awq inspect`: say what a model is, from the headers of its files."""

from typing import Annotated

import typer

from gemma_awq_cli.cli.console import Output
from gemma_awq_cli.cli.default_model import MODEL_VARIABLE, default_model
from gemma_awq_cli.cli.options import JsonOption, QuietOption, RevisionOption

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
    asked = model or default_model(out)
    from gemma_awq_cli.inspection.model import find_contents, inspect_contents
    from gemma_awq_cli.inspection.table import sections

    contents = find_contents(asked, revision, out.note)
    if compare is not None:
        return
    facts = inspect_contents(contents)
    if as_json:
        out.document(facts.document())
    else:
        out.result_facts(sections(facts))
