"""`gemma-awq export`: write an artifact in another runtime's format."""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

import typer

from gemma_awq_cli.cli.console import Output, Progress
from gemma_awq_cli.cli.options import OUTPUT, ExportFormat, GgufHead, JsonOption, QuietOption, RevisionOption, ScaleType
from gemma_awq_cli.events import Note, Warned
from gemma_awq_cli.system.sizes import format_bytes

if TYPE_CHECKING:
    from gemma_awq_cli.export.events import Event
    from gemma_awq_cli.export.exporting import Exported

EXAMPLES = """
gemma-awq export ./gemma-3-270m-AWQ --to gguf
gemma-awq export ./gemma-3-270m-AWQ --to gguf --compact --head q6_k -o ./small-gguf
gemma-awq export ./gemma-3-270m-AWQ --to compressed-tensors
gemma-awq export ./gemma-3-270m-AWQ --to mlx --scales bfloat16
"""

_GGUF, _SCALES = "GGUF", "MLX and compressed-tensors"


def command(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Folder or hub id of a 4-bit checkpoint.  [default: the last artifact]", metavar="MODEL"
        ),
    ] = None,
    to: Annotated[
        ExportFormat, typer.Option("--to", help="Format to write.", rich_help_panel=OUTPUT)
    ] = ExportFormat.gguf,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Write to the folder DIR.  [default: ./NAME-FORMAT]", metavar="DIR",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    revision: RevisionOption = None,
    compact: Annotated[
        bool,
        typer.Option(
            "--compact",
            help="Store linears as Q4_1 (5.0 bits per weight) and not as Q5_0 (5.5), which is exact.",
            rich_help_panel=_GGUF,
        ),
    ] = False,
    head: Annotated[
        GgufHead | None,
        typer.Option(help="Type of the embedding and the head.  [default: q8_0]", rich_help_panel=_GGUF),
    ] = None,
    scales: Annotated[
        ScaleType | None,
        typer.Option(
            help="Data type of the scales.  [default: float32 for mlx, float16 for compressed-tensors]",
            rich_help_panel=_SCALES,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue an interrupted export of the same command.", rich_help_panel=OUTPUT),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an export that is already in the folder.", rich_help_panel=OUTPUT)
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:  # fmt: skip
    """Write a 4-bit checkpoint in another runtime's format, with the same integers, scales and zero points.

    The folder appears when it is complete and was read back, and is printed on stdout. An interrupted export keeps its
    finished parts.
    """
    out = Output(quiet)
    if model is None:
        from gemma_awq_cli.cli.default_model import default_model

        model = default_model(out)
    from gemma_awq_cli.export.exporting import run_export
    from gemma_awq_cli.export.request import ExportRequest

    request = ExportRequest(
        model, to.value, output, revision, compact, head and head.value, scales and scales.value, resume, force
    )
    with _Screen(out) as screen:
        result = run_export(request, on_event=screen.show)
    _report(out, result, as_json)


class _Screen:
    """Shows events on stderr, with a progress bar."""

    def __init__(self, out: Output) -> None:
        self._out = out
        self._bar = ExitStack()
        self._progress = Progress(None, None)
        self._written = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self._written:
            self._out.note(f"{self._written} parts are kept. To continue, repeat the command with --resume.")
        self._bar.close()

    def show(self, event: "Event") -> None:
        from gemma_awq_cli.export import events

        match event:
            case Note(text):
                self._out.note(text)
            case Warned(text):
                self._out.warning(text)
            case events.ExportPlanned(source, target, form, nbytes):
                self._out.note(f"{source} -> {target}, {form}, {format_bytes(nbytes)}")
            case events.PartsStarted(parts, verifying):
                self._bar.close()
                title = "Reading back" if verifying else "Writing"
                self._progress = self._bar.enter_context(self._out.progress(title, parts))
                self._written = parts if verifying else 0
            case events.PartDone(index, parts, resumed):
                self._written = max(self._written, index + 1)
                if resumed:
                    self._progress.begin_at(index + 1, parts)
                else:
                    self._progress.step()


def _report(out: Output, result: "Exported", as_json: bool) -> None:
    document = result.document
    if result.found:
        out.note(f"{result.folder} was complete already.")
    worst = document["verified"]["largest_difference_in_scales"]
    same = f"no weight is off by more than {worst:.2g} of its scale" if worst else "every weight equals the source's"
    out.note(f"{document['form']}: read back, {same}.")
    if as_json:
        out.document({"export": str(result.folder), **document})
    else:
        out.result(str(result.folder))
