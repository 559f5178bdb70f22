"""`gemma-awq verify`: whether an artifact is what its report says it was made of."""

from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated

import typer

from gemma_awq_cli.cli.console import Output, Progress
from gemma_awq_cli.cli.default_model import last_artifact_folder
from gemma_awq_cli.cli.options import JsonOption, QuietOption, RevisionOption
from gemma_awq_cli.errors import NotComparableError, some
from gemma_awq_cli.events import Note, Warned

if TYPE_CHECKING:
    from gemma_awq_cli.quantize.events import Event
    from gemma_awq_cli.quantize.verifying import Verified

EXAMPLES = """
gemma-awq verify
gemma-awq verify ./my-awq --layers 100
gemma-awq verify OWNER/gemma-3-270m-AWQ --seed 1 --json
"""


def command(
    artifact: Annotated[
        str | None,
        typer.Argument(
            help="Folder or hub id of an artifact.  [default: the last artifact]",
            metavar="ARTIFACT",
            show_default=False,
        ),
    ] = None,
    layers: Annotated[int, typer.Option(help="Layers to quantize again, picked at random.", min=1, metavar="N")] = 3,
    seed: Annotated[
        int | None,
        typer.Option(help="Random seed of the choice of layers.  [default: drawn]", metavar="N", show_default=False),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            help="16-bit model that it was made from, if it is not where the report says.",
            metavar="MODEL",
            show_default=False,
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(help="Calibration text, if it is not where the report says.", metavar="TEXT", show_default=False),
    ] = None,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Quantize layers of an artifact again, as its report records, and compare the bytes.

    What is outside the layers is compared whole, and a published artifact's files with the hashes in its
    provenance.json first. The exit code is 0 if all is the same, 1 if something differs, and 4
    if it cannot be compared: the source is unavailable, or another version of torch or another processor rounds
    differently.
    """
    out = Output(quiet)
    from gemma_awq_cli.quantize.verifying import DIFFERENT, UNKNOWN, VerifyRequest, verify_artifact

    named = artifact if artifact is not None else str(last_artifact_folder(out, "artifact"))
    request = VerifyRequest(named, revision, layers, seed, source, calibration)
    with _Screen(out) as screen:
        result = verify_artifact(request, screen.show)
    if as_json:
        out.document(result.document)
    else:
        out.result_facts([("", _facts(result))])
    if result.verdict != "same":
        raise typer.Exit({DIFFERENT: 1, UNKNOWN: NotComparableError.exit_code}[result.verdict])


def _facts(result: "Verified") -> list[tuple[str, str]]:
    facts = [("artifact", str(result.artifact))]
    if result.layers:
        layers = ", ".join(str(index + 1) for index in result.layers)
        facts.append(("source", result.source))
        facts.append(("layers", f"{layers} of {result.of}, picked by seed {result.seed}"))
    if result.stated:
        facts.append(("stated hashes", f"{result.stated} files, in provenance.json"))
    facts.append(("result", result.verdict))
    if result.different:
        facts.append(("differs", some(result.different)))
    if result.conditions:
        facts.append(("not as recorded", "; ".join(result.conditions)))
    return facts


class _Screen:
    """Shows events on stderr, with a progress bar."""

    def __init__(self, out: Output) -> None:
        self._out = out
        self._bar = ExitStack()
        self._progress = Progress(None, None)

    def __enter__(self) -> "_Screen":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def show(self, event: "Event") -> None:
        from gemma_awq_cli.quantize import events

        match event:
            case Note(text):
                self._out.note(text)
            case Warned(text):
                self._out.warning(text)
            case events.SamplingStarted(_, _, steps):
                self._begin("Sampling", steps)
            case events.InformationStarted(steps, _):
                self._begin("Measuring outputs", steps)
            case events.VerifyingStarted(layers):
                self._begin("Quantizing", layers)
            case events.SamplingStep() | events.InformationStep():
                self._progress.step()
            case events.LayerPassed(index, same):
                if same is not None:
                    self._out.note(f"layer {index + 1}: {'same' if same else 'different'}")
                self._progress.step()
            case events.SamplingFinished() | events.InformationFinished():
                self._bar.close()

    def _begin(self, description: str, total: int) -> None:
        self._progress = self._bar.enter_context(self._out.progress(description, total))
