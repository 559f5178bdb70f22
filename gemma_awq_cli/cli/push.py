"""`gemma-awq push`: publish an artifact on the hub."""

import os
import sys
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemma_awq_cli.cli.console import Output, Progress
from gemma_awq_cli.cli.default_model import last_artifact_folder
from gemma_awq_cli.cli.options import JsonOption, QuietOption
from gemma_awq_cli.errors import Terminated, UsageError
from gemma_awq_cli.events import Note
from gemma_awq_cli.system.devices import DEVICES_HELP
from gemma_awq_cli.system.sizes import format_bytes

if TYPE_CHECKING:
    from gemma_awq_cli.publish.events import Event
    from gemma_awq_cli.publish.preparation import Prepared
    from gemma_awq_cli.publish.push import Pushed, PushRequest
    from gemma_awq_cli.publish.upload_file import UploadFile
    from gemma_awq_cli.publish.upload_plan import UploadPlan

EXAMPLES = """
gemma-awq push you/gemma-3-270m-AWQ --dry-run
gemma-awq push you/gemma-3-270m-AWQ ./gemma-3-270m-awq --private --yes
gemma-awq push you/gemma-3-270m-AWQ --formats awq,gguf
gemma-awq push you/gemma-3-270m-GGUF --formats gguf
gemma-awq push you/my-gemma-AWQ ./my-awq --base-model google/gemma-3-1b-it --license gemma --deep
"""

_REPOSITORY = "Repository"
_CARD = "Licence and model card"
_CHECKS = "Checks"
_OUTPUT = "Output"


def command(
    repo_id: Annotated[
        str, typer.Argument(help="Repository on the hub, OWNER/NAME. Created if it does not exist.", metavar="REPO_ID")
    ],
    folder: Annotated[
        Path | None, typer.Argument(help="Folder of the artifact.  [default: the last artifact]", metavar="DIR")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Create the repository as private.", rich_help_panel=_REPOSITORY)
    ] = False,
    revision: Annotated[
        str,
        typer.Option(
            help="Branch to push to. Created if it does not exist.", metavar="REV", rich_help_panel=_REPOSITORY
        ),
    ] = "main",
    create_pr: Annotated[
        bool,
        typer.Option(
            "--create-pr", help="Open a pull request instead of pushing to the branch.", rich_help_panel=_REPOSITORY
        ),
    ] = False,
    message: Annotated[
        str | None,
        typer.Option(
            "--message", "-m", help="Commit message.  [default: the version and the base model]",
            rich_help_panel=_REPOSITORY,
        ),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            help="Hub id of the base model, for an artifact that was quantized from a local folder.",
            metavar="OWNER/NAME", rich_help_panel=_CARD,
        ),
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option(
            "--license", help="Licence of the source, if its card declares none.", metavar="ID", rich_help_panel=_CARD
        ),
    ] = None,
    licence_file: Annotated[
        Path | None,
        typer.Option(
            "--license-file", help="Text of a derived model's own licence. Needs --license.", metavar="FILE",
            rich_help_panel=_CARD,
        ),
    ] = None,
    replace_card: Annotated[
        bool,
        typer.Option(
            "--replace-card", help="Replace the model card even if it was edited on the hub.", rich_help_panel=_CARD
        ),
    ] = False,
    foreign: Annotated[
        bool,
        typer.Option(
            "--foreign", help="Publish a 4-bit model that another tool quantized. Its card says which one.",
            rich_help_panel=_CARD,
        ),
    ] = False,
    formats: Annotated[
        str,
        typer.Option(
            help="What to publish: the artifact, its weights as GGUF (llama.cpp, Ollama), or both in one repository.",
            metavar="awq|gguf|awq,gguf", rich_help_panel=_REPOSITORY,
        ),
    ] = "awq",
    deep: Annotated[
        bool,
        typer.Option(
            "--deep", help="First generate some tokens and measure the KL divergence again.", rich_help_panel=_CHECKS
        ),
    ] = False,
    source: Annotated[
        str | None,
        typer.Option(
            help="Original 16-bit checkpoint for --deep: a folder or a hub id.  [default: the one in the report]",
            metavar="MODEL", rich_help_panel=_CHECKS,
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help=f"For --deep: {DEVICES_HELP}", metavar="DEVICE", rich_help_panel=_CHECKS)
    ] = "auto",
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Check the artifact, list the files and print the card. Needs no network and no login.",
            rich_help_panel=_CHECKS,
        ),
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Push without asking for confirmation.", rich_help_panel=_CHECKS)
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:  # fmt: skip
    """Publish an artifact on the Hugging Face hub.

    Checks the artifact for damage, secrets and local paths, adds its model card and licence, uploads what differs from
    the hub's copy in one commit, and compares every file on the hub with the local one afterwards. Prints the page's
    URL on stdout.
    """
    out = Output(quiet)
    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    if source is not None and not deep:
        raise UsageError("--source needs --deep.")
    artifact = folder or last_artifact_folder(out, "artifact")
    from gemma_awq_cli.publish.push import PushRequest, check, push

    request = PushRequest(
        artifact, repo_id, revision, private, create_pr, message, base_model, licence, licence_file, replace_card, deep,
        source, device, foreign, tuple(formats.split(",")),
    )  # fmt: skip
    with _Reporter(out) as report:
        if dry_run:
            _print_preview(out, request, check(request, report), as_json)
            return
        if not yes and not sys.stdin.isatty():
            raise UsageError(
                "Pushing needs your confirmation, and standard input is not a terminal.",
                "Look at it with --dry-run, then push with --yes.",
            )

        def confirm(plan: "UploadPlan") -> bool:
            _show_plan(out, request, plan)
            return yes or out.confirm("Push?")

        pushed = push(request, report, confirm)
    _print_result(out, request, pushed, as_json)


class _Reporter:
    """Shows the events of a push: notes, a progress bar for the deep check, and what an interrupt leaves behind."""

    def __init__(self, out: Output) -> None:
        self._out = out
        self._bars = ExitStack()
        self._bar: Progress | None = None
        self._uploading = False

    def __call__(self, event: "Event") -> None:
        from gemma_awq_cli.publish import events

        match event:
            case Note(text):
                self._out.note(text)
            case events.MeasuringStarted(steps):
                self._bar = self._bars.enter_context(self._out.progress("Measuring again", steps))
            case events.MeasuringStep():
                assert self._bar is not None, "a step follows the start"
                self._bar.step()
            case events.MeasuringFinished():
                self._bars.close()
            case events.UploadStarted():
                self._uploading = True

    def __enter__(self) -> "_Reporter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.close()
        if self._uploading and isinstance(error, KeyboardInterrupt | Terminated):
            self._out.note("Run the command again to go on: files that have arrived are not sent again.")


def _print_preview(out: Output, request: "PushRequest", prepared: "Prepared", as_json: bool) -> None:
    private = " (private if new)" if request.private else ""
    _show_files(out, f"Would be pushed to {_target(request)}{private}", prepared.files)
    if as_json:
        out.document({**_document(prepared, prepared.files), "card": prepared.card})
    else:
        out.result(prepared.card.rstrip("\n"))


def _show_plan(out: Output, request: "PushRequest", plan: "UploadPlan") -> None:
    kind = "private" if plan.private else "public"
    if plan.sent:
        _show_files(out, f"To {_target(request)} ({'new, ' if plan.creates else ''}{kind})", plan.sent)
    for name in plan.removed:
        out.note(f"{name} on the hub belongs to an earlier artifact and will be removed.")
    if not plan.private:
        out.note("Everyone will be able to read it.")


def _print_result(out: Output, request: "PushRequest", pushed: "Pushed", as_json: bool) -> None:
    plan = pushed.plan
    if plan.card_kept:
        out.warning("The card on the hub was edited by hand and is kept; --replace-card replaces it.")
    done = f"Committed {len(plan.sent)} files, {format_bytes(plan.bytes)}" if plan.sent else "Nothing had to be sent"
    out.note(f"{done}; size and hash of {pushed.verified} files on the hub match the local ones.")
    if pushed.pull_request:
        number = pushed.pull_request.rstrip("/").rsplit("/", 1)[1]
        out.note(f"To change this pull request: gemma-awq push {request.repo} --revision refs/pr/{number}")
    if as_json:
        out.document(
            {
                **_document(pushed.prepared, plan.sent), "url": pushed.url, "commit": pushed.commit,
                "pull_request": pushed.pull_request, "private": plan.private, "removed": list(plan.removed),
                "card_kept": plan.card_kept, "verified": pushed.verified,
            }
        )  # fmt: skip
    else:
        out.result(pushed.url)


def _target(request: "PushRequest") -> str:
    return f"{request.repo}, {'a pull request to ' if request.create_pr else ''}{request.revision}"


def _document(prepared: "Prepared", files: "tuple[UploadFile, ...]") -> dict[str, Any]:
    """The part of the JSON document that a dry run and a push share."""
    return {
        "repo": prepared.repo,
        "artifact": str(prepared.folder),
        "license": prepared.licence.metadata,
        "files": [{"name": file.name, "bytes": file.size} for file in files],
    }


def _show_files(out: Output, title: str, files: "tuple[UploadFile, ...]") -> None:
    rows = [(file.name, format_bytes(file.size)) for file in files]
    total = format_bytes(sum(file.size for file in files))
    out.note(title)
    out.table("", (*rows, (f"{len(files)} files", total)), header=("file", "size"))
