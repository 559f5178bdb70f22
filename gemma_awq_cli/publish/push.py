"""The verb `push`: an artifact to the hub, all of it or nothing, checked before and after.

`check` needs neither network nor login unless a deep check asks for the original: it validates the artifact and settles
every byte of the page. `push` compares that with what the hub has, sends what differs in one commit on top of the
commit it compared with, and then compares every file's size and hash on the hub with the local one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.events import Note
from gemma_awq_cli.publish.deep_check import check_deeply
from gemma_awq_cli.publish.events import Event, UploadStarted
from gemma_awq_cli.publish.foreign_model import prepare_foreign
from gemma_awq_cli.publish.hub_repository import (
    MAIN,
    commit_plan,
    create_branch,
    has_edited_card,
    hub_client,
    page_url,
    read_branch,
    verify_files,
)
from gemma_awq_cli.publish.licensing import read_derived_licence
from gemma_awq_cli.publish.preparation import AWQ, FORMATS, Prepared, prepare
from gemma_awq_cli.publish.upload_plan import UploadPlan, plan_upload
from gemma_awq_cli.reports.artifact_files import CARD
from gemma_awq_cli.system.devices import require_device_name


@dataclass(frozen=True)
class PushRequest:
    """What to push, where, and what to check first.

    repo: OWNER/NAME; private: of a repository that is created; message: of the commit, None for one that names the tool
    and the base model; base_model: a hub id, needed if the artifact was quantized from a local folder; licence: the id
    of the source's licence where it declares none; licence_file: the text of a derived model's own licence; deep:
    generate some tokens and measure the KL divergence again, against `source` or where the report says that the
    original came from; device: auto, cpu, cuda, cuda:N or mps, for the deep check; foreign: another tool
    quantized the model; formats: `awq`, the artifact itself, `gguf`, its weights for llama.cpp, or both.
    """

    folder: Path
    repo: str
    revision: str = MAIN
    private: bool = False
    create_pr: bool = False
    message: str | None = None
    base_model: str | None = None
    licence: str | None = None
    licence_file: Path | None = None
    replace_card: bool = False
    deep: bool = False
    source: str | None = None
    device: str = "auto"
    foreign: bool = False
    formats: tuple[str, ...] = (AWQ,)

    def __post_init__(self) -> None:
        one_or_both = f"Give one or both of {', '.join(FORMATS)}."
        if unknown := [name for name in self.formats if name not in FORMATS]:
            raise UsageError(f"Invalid format: {unknown[0]!r:.50}.", one_or_both)
        if not self.formats or len(set(self.formats)) < len(self.formats):
            raise UsageError("A format is named twice, or none is.", one_or_both)
        require_device_name(self.device)
        if self.foreign and self.formats != (AWQ,):
            raise UsageError("--formats is for artifacts of this tool.", "Leave out --formats or --foreign.")


@dataclass(frozen=True)
class Pushed:
    """The result. url: of the page or the pull request; verified: how many files were compared on the hub."""

    prepared: Prepared
    plan: UploadPlan
    url: str
    commit: str
    verified: int
    pull_request: str | None = None


def check(request: PushRequest, on_event: Callable[[Event], None]) -> Prepared:
    """Check the artifact and make its page; sends nothing. Raises if it may not be pushed."""
    derived = read_derived_licence(request.licence, request.licence_file)
    on_event(Note(f"Checking {request.folder}."))
    if request.foreign and request.deep:
        raise UsageError(
            "--deep measures again what a report says, and a model of another tool has none.",
            "Push it without --deep. `gemma-awq bench --save` measures it, and its card then shows the figures.",
        )
    asked = (request.folder, request.repo, request.base_model, request.licence, derived)
    prepared = prepare_foreign(*asked) if request.foreign else prepare(*asked, request.formats, on_event)
    for note in prepared.notes:
        on_event(Note(note))
    if request.deep:
        check_deeply(prepared, request.source, request.device, on_event)
    return prepared


def push(
    request: PushRequest, on_event: Callable[[Event], None], confirm: Callable[[UploadPlan], bool] = lambda _: True
) -> Pushed:
    """Check the artifact, publish it, and verify what arrived.

    confirm: shown what is about to change, if anything is; False ends the push with an error.
    """
    prepared = check(request, on_event)
    api = hub_client()
    repo, revision = request.repo, request.revision
    branch = read_branch(api, repo, revision)
    if request.create_pr and not branch.exists:
        raise GemmaAwqError(f"{repo} has no {revision} to propose changes to.", "Push without --create-pr.")
    edited = has_edited_card(api, repo, branch)
    plan = plan_upload(prepared, branch, edited, request.replace_card, request.private)
    expected = [file for file in prepared.files if not (plan.card_kept and file.name == CARD)]
    if branch.commit is not None and branch.exists and not plan.sent and not plan.removed:
        verified = verify_files(api, repo, branch.commit, expected)
        return Pushed(prepared, plan, page_url(api, repo, revision), branch.commit, verified)
    if not confirm(plan):
        raise GemmaAwqError("Nothing was pushed.", "Push with --yes, or answer y.")
    on_event(UploadStarted())
    parent = branch.commit if branch.exists else None
    if parent is None:
        parent = create_branch(api, repo, revision, request.private, branch)
    message = request.message or prepared.message
    commit = commit_plan(api, repo, revision, parent, request.create_pr, message, plan)
    verified = verify_files(api, repo, commit.reference, expected)
    url = commit.pull_request or page_url(api, repo, revision)
    return Pushed(prepared, plan, url, commit.id, verified, commit.pull_request)
