"""`gemma-awq push`: publish an artifact on the hub."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemma_awq_cli.cli.console import Output, human_bytes
from gemma_awq_cli.cli.options import Device, DeviceOption, JsonOption, QuietOption
from gemma_awq_cli.errors import GemmaAwqError, Terminated, UsageError

if TYPE_CHECKING:
    from gemma_awq_cli.publish.upload import Prepared, Step
    from gemma_awq_cli.publish.upload_files import OutgoingFile


def command(
    repo_id: Annotated[str, typer.Argument(help="OWNER/NAME on the hub; made if it is not there.", metavar="REPO_ID")],
    folder: Annotated[Path | None, typer.Argument(help="The artifact.  [default: the last one]", metavar="DIR")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str, typer.Option(help="Branch to push to; made if it is not there.", metavar="REV")] = "main",
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    message: Annotated[
        str | None, typer.Option("--message", "-m", help="Of the commit.  [default: says what was pushed]")
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(help="The source's hub id, where it was quantized from a local folder.", metavar="OWNER/NAME"),
    ] = None,
    licence: Annotated[
        str | None, typer.Option("--license", help="The licence, where the source declares none.", metavar="ID")
    ] = None,
    licence_file: Annotated[
        Path | None,
        typer.Option("--license-file", help="Text of a derived model's own licence, with --license.", metavar="FILE"),
    ] = None,
    replace_card: Annotated[
        bool, typer.Option("--replace-card", help="Replace a card that was edited by hand on the hub.")
    ] = False,
    deep: Annotated[
        bool, typer.Option("--deep", help="First generate some tokens and measure the KL divergence again.")
    ] = False,
    source: Annotated[
        str | None, typer.Option(help="The original 16-bit checkpoint, for --deep.", metavar="MODEL")
    ] = None,
    device: DeviceOption = Device.auto,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check, list the files, print the card, and stop: no network, no login.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Publish an artifact on the hub: checked, with its card and its licence, and compared with the hub's copy after.

    Prints the page's URL on stdout.
    """
    out = Output(quiet)
    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    if source is not None and not deep:
        raise UsageError("--source goes with --deep.")
    chosen = folder or _last_artifact(out)
    from gemma_awq_cli.publish import upload
    from gemma_awq_cli.publish.licensing import read_own

    own = read_own(licence, licence_file)
    out.note(f"Checking {chosen}.")
    prepared = upload.prepare(chosen, repo_id, base_model, licence, own)
    for line in prepared.notes:
        out.note(line)
    if deep:
        _check_deeply(out, prepared, source, device.value)
    target = f"{repo_id}, {'a pull request to ' if create_pr else ''}{revision}"
    if dry_run:
        _show_files(out, f"Would be pushed to {target}{' (private if new)' if private else ''}", prepared.files)
        if as_json:
            out.document({**_described(prepared, prepared.files), "card": prepared.card})
        else:
            out.result(prepared.card.rstrip("\n"))
        return
    if not yes and not sys.stdin.isatty():
        raise UsageError("There is nobody to ask.", "Look at it with --dry-run, then push with --yes.")
    api = upload.hub_client()
    sending = False

    def agree(step: "Step") -> None:
        nonlocal sending
        _show_step(out, step, target)
        if not yes and not out.confirm("Push?"):
            raise GemmaAwqError("Nothing was pushed.", "Push with --yes, or answer y.")
        sending = True

    summary = message or f"gemma-awq {prepared.report['versions']['gemma_awq']}: {prepared.base_model} in 4 bits"
    try:
        result = upload.push(api, prepared, revision, private, create_pr, replace_card, summary, agree)
    except (KeyboardInterrupt, Terminated):
        if sending:
            out.note("Repeat the command to go on: what has arrived is not sent again.")
        raise
    step = result.step
    if step.card_kept:
        out.warning("The card on the hub was edited by hand and is kept as it is; --replace-card replaces it.")
    done = f"{len(step.sent)} files, {human_bytes(step.bytes)} committed" if step.sent else "Nothing had to be sent"
    out.note(f"{done}; size and hash of {result.verified} files on the hub compared with the local ones.")
    if result.pull_request:
        number = result.pull_request.rstrip("/").rsplit("/", 1)[1]
        out.note(f"To change this pull request: gemma-awq push {repo_id} --revision refs/pr/{number}")
    if as_json:
        out.document(
            {
                **_described(prepared, step.sent), "url": result.url, "commit": result.commit,
                "pull_request": result.pull_request, "private": step.private, "removed": list(step.removed),
                "card_kept": step.card_kept, "verified": result.verified,
            }
        )  # fmt: skip
    else:
        out.result(result.url)


def _last_artifact(out: Output) -> Path:
    from gemma_awq_cli.models.checkpoints.cache import last_artifact

    last = last_artifact()
    if last is None or not last.is_dir():
        raise GemmaAwqError("No artifact is named and no last one is there.", "Name it: gemma-awq push REPO_ID DIR.")
    out.note(f"Artifact: {last} (the last one)")
    return last


def _check_deeply(out: Output, prepared: "Prepared", source: str | None, device: str) -> None:
    from gemma_awq_cli.fidelity.comparison import comparison_steps
    from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
    from gemma_awq_cli.models.forward.loading import pick_device
    from gemma_awq_cli.models.text.prompter import Prompter
    from gemma_awq_cli.publish import deep_check

    chosen = pick_device(device)
    report = prepared.report
    original = deep_check.original_checkpoint(report, source, out.note)
    artifact = Checkpoint(prepared.folder)
    rows = deep_check.heldout_rows(report, Prompter(prepared.folder))
    with out.progress("Measuring again", comparison_steps(rows, artifact.layers)) as progress:
        measured = deep_check.remeasure(artifact, original, rows, chosen, progress.step)
    deep_check.require_recorded(measured, report)
    out.note(f"KL divergence measured again: {measured.kl:.4f} (the report tells {report['fidelity']['kl']:.4f}).")
    out.note(f"It continues {deep_check.PROMPT!r} with {deep_check.generate(prepared.folder, chosen)!r}.")


def _described(prepared: "Prepared", files: "tuple[OutgoingFile, ...]") -> dict[str, Any]:
    return {
        "repo": prepared.repo,
        "artifact": str(prepared.folder),
        "license": prepared.licence.metadata,
        "files": [{"name": file.name, "bytes": file.size} for file in files],
    }


def _show_files(out: Output, title: str, files: "tuple[OutgoingFile, ...]") -> None:
    rows = [(file.name, human_bytes(file.size)) for file in files]
    total = human_bytes(sum(file.size for file in files))
    out.note(title)
    out.table("", (*rows, (f"{len(files)} files", total)), header=("file", "size"))


def _show_step(out: Output, step: "Step", target: str) -> None:
    kind = "private" if step.private else "public"
    if step.sent:
        _show_files(out, f"To {target} ({'new, ' if step.creates else ''}{kind})", step.sent)
    for name in step.removed:
        out.note(f"{name} on the hub belongs to an earlier artifact and is removed.")
    if not step.private:
        out.note("Everyone will be able to read it.")
