"""The verb `push`: an artifact to a hub, whole or not at all, checked before and after.

`prepare` needs neither network nor login: it validates the artifact and settles every byte of the page. `push` compares
that with what the hub has, sends what differs in one commit on top of the commit it compared with, and then compares
every file's size and hash on the hub with the local one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from gemma_awq_cli import __version__
from gemma_awq_cli.bench.document import BENCH
from gemma_awq_cli.errors import GemmaAwqError, some
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.files import CONFIG, read_json
from gemma_awq_cli.models.checkpoints.hub import LOGIN, REPO_ID, push_errors
from gemma_awq_cli.models.checkpoints.local_paths import to_json
from gemma_awq_cli.models.checkpoints.source import DEMO
from gemma_awq_cli.models.checkpoints.staging import REPORT
from gemma_awq_cli.models.forward.verification import require_complete
from gemma_awq_cli.publish.licensing import Licence, Own, decide
from gemma_awq_cli.publish.model_card import Subject, changed_sentence, is_unedited, render
from gemma_awq_cli.publish.upload_files import (
    CARD,
    OutgoingFile,
    leftovers,
    licence_files,
    outgoing_file,
    published_bench,
    published_report,
    require_nothing_private,
    require_publishable,
    require_weights_named,
)
from gemma_awq_cli.reports.stored_documents import read_bench_document, read_quantization_report
from gemma_awq_cli.system.reading import read_bytes
from gemma_awq_cli.system.text_input import decode

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MAIN = "main"
# What a reader may load as this model: older ones must not stay beside the new ones.
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_ENDPOINT = "Check HF_ENDPOINT, and any proxy or firewall."
_BY_HAND = "Move it away, push, and edit the card on the hub: a card that is edited there is kept."
FOREIGN_WEIGHTS = (*WEIGHTS, "*.bin", "*.gguf", "*.pt", "*.pth")


@dataclass(frozen=True)
class Prepared:
    """All that will be on the page, in bytes: nothing of it depends on the hub."""

    repo: str
    folder: Path
    report: Mapping[str, Any]
    base_model: str
    licence: Licence
    card: str
    files: tuple[OutgoingFile, ...]
    notes: tuple[str, ...] = ()  # what of the folder goes otherwise than it is, or not at all

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)


@dataclass(frozen=True)
class RemoteFile:
    """A file as the hub lists it. sha256 for a large file, else blob_id is its git hash."""

    size: int
    blob_id: str
    sha256: str | None

    def matches(self, file: OutgoingFile) -> bool:
        if self.size != file.size:
            return False
        return self.sha256 == file.sha256 if self.sha256 is not None else self.blob_id == file.blob_id


@dataclass(frozen=True)
class Remote:
    """What the hub has. private: None if there is no such repository yet. commit: where the branch is, or the main one
    that it will begin at if has_branch is false; files: of that commit.
    """

    private: bool | None = None
    commit: str | None = None
    has_branch: bool = False
    files: Mapping[str, RemoteFile] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """What is about to be sent, for the user to agree to. creates: the repository is new."""

    creates: bool
    private: bool
    sent: tuple[OutgoingFile, ...]
    removed: tuple[str, ...]
    card_kept: bool

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.sent)


@dataclass(frozen=True)
class Pushed:
    """The result. url: of the page or the pull request; commit: what was compared after."""

    url: str
    commit: str
    step: Step
    verified: int
    pull_request: str | None = None


def prepare(folder: Path, repo: str, base_model: str | None, licence: str | None, own: Own | None) -> Prepared:
    """Validate the artifact in `folder` and make all that goes with it; an error if it may not be published."""
    if not REPO_ID.fullmatch(repo):
        raise GemmaAwqError(f"{repo!r} is no repository id.", "Give OWNER/NAME, such as your-name/gemma-3-270m-AWQ.")
    report = read_report(folder)
    files = require_publishable(folder)
    require_weights_named(folder, files)
    checkpoint, prompter = require_complete(folder, report["artifact"]["bytes"])
    source = report["source"]
    base, declared, provenance = _origin(source, base_model)
    weights = [path.name for path in files if path.suffix == ".safetensors"]
    changed = changed_sentence(report, base, weights)
    decided = decide(source["model_type"], declared, licence_files(files), changed, licence, own)
    bench = read_bench(folder, checkpoint)
    shown, measured = published_report(report), published_bench(bench) if bench is not None else None
    card = render(
        Subject(repo, base, shown, decided, prompter.is_chat, checkpoint.tied_head, changed, provenance, measured)
    )
    made = {**decided.files, REPORT: to_json(shown), CARD: card.encode()}
    if measured is not None:
        made[BENCH] = to_json(measured)
    if (folder / CARD).is_file() and not is_unedited(decode(read_bytes(folder / CARD, _BY_HAND), CARD, _BY_HAND)):
        raise GemmaAwqError(f"{folder / CARD} was written by hand; the card is made from the report.", _BY_HAND)
    outgoing = {name: OutgoingFile(name, content) for name, content in made.items()}
    notes = []
    for path in files:
        if path.name not in outgoing:
            outgoing[path.name], fields = outgoing_file(path)
            if fields:
                notes.append(f"{path.name} is sent without the places of this machine that it names: {some(fields)}")
    if ignored := leftovers(folder):
        notes.append(f"Not sent, because the system left it there: {some(ignored)}")
    prepared = tuple(outgoing[name] for name in sorted(outgoing))
    require_nothing_private(prepared)
    return Prepared(repo, folder, report, base, decided, card, prepared, tuple(notes))


def read_report(folder: Path) -> dict[str, Any]:
    """An artifact's report; an error if the folder is no artifact of this tool, or the report is not whole."""
    if not folder.is_dir():
        raise GemmaAwqError(f"{folder} is not a folder.", "Give the folder that `gemma-awq quantize` wrote.")
    if not (folder / REPORT).is_file() or not (folder / CONFIG).is_file():
        raise GemmaAwqError(
            f"{folder} is not an artifact of this tool (it has no {REPORT} or no {CONFIG}).",
            "Give the folder that `gemma-awq quantize` wrote.",
        )
    report = read_quantization_report(folder)
    stored = read_json(folder / CONFIG)
    quantization = stored.get("quantization_config")
    for part, name, now in (
        ("source", "model_type", stored.get("model_type")),
        ("artifact", "group_size", quantization.get("group_size") if isinstance(quantization, dict) else None),
    ):
        if now != report[part][name]:
            raise GemmaAwqError(
                f"{REPORT} tells {name} {report[part][name]}, but {CONFIG} says {now}.",
                "They are of different artifacts. Quantize the model again.",
            )
    return report


def read_bench(folder: Path, checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What `bench --save` kept beside the weights, if it did; an error if it was measured on other weights."""
    if not (folder / BENCH).is_file():
        return None
    again = f"Measure again with `gemma-awq bench --save`, or remove {BENCH}."
    bench = read_bench_document(folder / BENCH, again)
    if not bench["complete"]:
        raise GemmaAwqError(f"{folder / BENCH} is not complete.", again)
    own = checkpoint.identity()
    if not any(model["role"] == "model" and model["identity"] == own for model in bench["models"]):
        raise GemmaAwqError(f"{folder / BENCH} was measured on other weights than these.", again)
    return bench


def _origin(source: Mapping[str, Any], given: str | None) -> tuple[str, Mapping[str, Any] | None, str]:
    """The base model's hub id, what its card declares, and what else must be said of where the weights came from."""
    if given is not None and not REPO_ID.fullmatch(given):
        raise GemmaAwqError(f"{given!r} is no hub id.", "Give --base-model OWNER/NAME.")
    if source["model"] == DEMO:
        from gemma_awq_cli.models.checkpoints.demo import BASE_MODEL, DECLARED, PROVENANCE

        return given or BASE_MODEL, DECLARED, PROVENANCE
    declared = source.get("card")
    if given is not None or (source["revision"] and REPO_ID.fullmatch(source["model"])):
        return given or str(source["model"]), declared, ""
    hint = "Name it with --base-model OWNER/NAME"
    named = (declared or {}).get("base_model")
    raise GemmaAwqError(
        "This artifact was quantized from a local folder, so its base model on the hub is not known.",
        f"{hint} (the source's card names {named} as its own base)." if named else f"{hint}.",
    )


def hub_client() -> "HfApi":
    """The hub's client, with the login that the user has; an error if there is none."""
    from huggingface_hub import HfApi, constants, get_token

    if constants.is_offline_mode():
        raise GemmaAwqError("HF_HUB_OFFLINE is set, so nothing can be pushed.", "Unset HF_HUB_OFFLINE.")
    if get_token() is None:
        raise GemmaAwqError("There is no login for the hub.", f"{LOGIN} The token must be allowed to write.")
    return HfApi(library_name="gemma-awq", library_version=__version__)


def look(api: "HfApi", repo: str, revision: str) -> Remote:
    """What the hub has of a repository's branch."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    with push_errors(repo, revision):
        try:
            info = api.model_info(repo, revision=revision)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError as error:
            if error.response.status_code == 401:
                raise
            return Remote()
        except RevisionNotFoundError:
            if revision.startswith("refs/"):
                raise
            return replace(look(api, repo, MAIN), has_branch=False)
        return Remote(bool(info.private), info.sha, True, _listed(api, repo, str(info.sha)))


def _listed(api: "HfApi", repo: str, revision: str) -> dict[str, RemoteFile]:
    from huggingface_hub.hf_api import RepoFile

    try:
        listed = {
            entry.path: RemoteFile(entry.size, entry.blob_id, entry.lfs.sha256 if entry.lfs is not None else None)
            for entry in api.list_repo_tree(repo, revision=revision, recursive=True)
            if isinstance(entry, RepoFile)
        }
    except (LookupError, TypeError, AttributeError):  # the client takes an answer's fields as they come
        raise GemmaAwqError(f"What answered for {repo} is not a hub.", _ENDPOINT) from None
    for path in listed:
        if not isinstance(path, str) or _is_odd(path):
            raise GemmaAwqError(f"The hub lists a file of {repo} under a name that no file has: {path!r}.", _ENDPOINT)
    return listed


def _is_odd(path: str) -> bool:
    """Whether a path leads elsewhere, or is none."""
    parts = path.split("/")
    return not path.isprintable() or any(part in ("", ".", "..", ".git") for part in parts) or "\\" in path


def compare(prepared: Prepared, remote: Remote, card_edited: bool, replace_card: bool, private: bool) -> Step:
    """What has to be sent and removed for the hub to hold exactly this artifact."""
    if private and remote.private is False:
        raise GemmaAwqError(
            f"{prepared.repo} is public, and --private does not change that.",
            "Make it private in its settings on the hub first, or push without --private.",
        )
    foreign = sorted(name for name in remote.files if any(fnmatch(name, pattern) for pattern in FOREIGN_WEIGHTS))
    if foreign and REPORT not in remote.files:
        raise GemmaAwqError(
            f"{prepared.repo} holds another model already ({foreign[0]}, and no {REPORT}); it is not replaced.",
            "Push to another repository, or to another branch with --revision after removing the files there.",
        )
    keep = card_edited and not replace_card
    files = tuple(file for file in prepared.files if not (keep and file.name == CARD))
    sent = tuple(f for f in files if f.name not in remote.files or not remote.files[f.name].matches(f))
    ours = {file.name for file in prepared.files}
    removed = tuple(
        name for name in sorted(remote.files) if name not in ours and any(fnmatch(name, p) for p in WEIGHTS)
    )
    return Step(remote.private is None, private if remote.private is None else remote.private, sent, removed, keep)


def card_was_edited(api: "HfApi", repo: str, remote: Remote) -> bool:
    """Whether a person wrote or changed the card that is on the hub."""
    if CARD not in remote.files or remote.commit is None:
        return False
    with push_errors(repo, remote.commit):
        path = api.hf_hub_download(repo, CARD, revision=remote.commit)
        return not is_unedited(Path(path).read_text(encoding="utf-8", errors="replace"))


def push(
    api: "HfApi",
    prepared: Prepared,
    revision: str,
    private: bool,
    create_pr: bool,
    replace_card: bool,
    message: str,
    agree: Callable[[Step], None],
) -> Pushed:
    """Publish. `agree` is shown what is about to be done, and raises if the user does not want it."""
    repo = prepared.repo
    remote = look(api, repo, revision)
    if create_pr and not remote.has_branch:
        raise GemmaAwqError(f"{repo} has no {revision} to propose changes to.", "Push without --create-pr.")
    edited = card_was_edited(api, repo, remote)
    step = compare(prepared, remote, edited, replace_card, private)
    if remote.commit is not None and remote.has_branch and not step.sent and not step.removed:
        return Pushed(_url(api, repo, revision), remote.commit, step, _verify(api, prepared, remote.commit, step))
    agree(step)
    commit = remote.commit if remote.has_branch else None
    if commit is None:
        commit = _begin(api, repo, revision, private, remote)
    oid, pull_request, reference = _commit(api, repo, revision, commit, create_pr, message, step)
    verified = _verify(api, prepared, reference, step)
    return Pushed(pull_request or _url(api, repo, revision), oid, step, verified, pull_request)


def _begin(api: "HfApi", repo: str, revision: str, private: bool, remote: Remote) -> str:
    """Make the repository and the branch as far as they are missing: the commit that the branch is at."""
    with push_errors(repo, revision):
        if remote.private is None:
            api.create_repo(repo, private=True if private else None, exist_ok=False)
        if revision != MAIN:
            api.create_branch(repo, branch=revision, exist_ok=False)
        return str(api.model_info(repo, revision=revision).sha)


def _commit(
    api: "HfApi", repo: str, revision: str, parent: str, create_pr: bool, message: str, step: Step
) -> tuple[str, str | None, str]:
    """Send the files in one commit on top of `parent`: its id, the pull request's address, what to read it back by."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    operations = [CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file.content) for file in step.sent]
    removals = [CommitOperationDelete(path_in_repo=name) for name in step.removed]
    # One commit, not the client's `upload_folder`, which may publish a large folder in several: a page is whole or not
    with push_errors(repo, revision):
        info = api.create_commit(
            repo,
            [*operations, *removals],
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=parent,
        )
    return info.oid, info.pr_url, info.pr_revision or info.oid


def _verify(api: "HfApi", prepared: Prepared, revision: str, step: Step) -> int:
    """Compare every file's size and hash on the hub with the local one: how many there are."""
    with push_errors(prepared.repo, revision):
        listed = _listed(api, prepared.repo, revision)
    wrong = []
    files = [file for file in prepared.files if not (step.card_kept and file.name == CARD)]
    for file in files:
        there = listed.get(file.name)
        if there is None or not there.matches(file):
            wrong.append(f"{file.name} ({'missing' if there is None else f'{there.size} bytes, another hash'})")
    if wrong:
        raise GemmaAwqError(
            f"What {prepared.repo} holds now is not what was sent: {', '.join(wrong[:3])}.",
            "Do not use it. Run the command again; if it stays so, something between here and the hub changes files.",
        )
    return len(files)


def _url(api: "HfApi", repo: str, revision: str) -> str:
    return f"{api.endpoint}/{repo}" + ("" if revision == MAIN else f"/tree/{quote(revision, safe='')}")
