"""A model repository on the hub: what a branch of it holds, a commit to it, and whether that arrived.

The client's errors become `GemmaAwqError`s here (`push_errors`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from gemma_awq_cli import __version__
from gemma_awq_cli.errors import GemmaAwqError, some
from gemma_awq_cli.models.checkpoints.hub import LOGIN, offline_push, push_errors
from gemma_awq_cli.publish.model_card import is_unedited
from gemma_awq_cli.publish.upload_file import UploadFile
from gemma_awq_cli.publish.upload_plan import Branch, HubFile, UploadPlan
from gemma_awq_cli.reports.artifact_files import CARD

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MAIN = "main"
_ENDPOINT = "Check HF_ENDPOINT, and any proxy or firewall."


@dataclass(frozen=True)
class Commit:
    """A commit on the hub. reference: the revision to read it back by; pull_request: its URL if one was opened."""

    id: str
    reference: str
    pull_request: str | None


def hub_client() -> "HfApi":
    """Return the hub's client with the user's login; raises if there is no login."""
    from huggingface_hub import HfApi, constants, get_token

    if constants.is_offline_mode():
        raise offline_push()
    if get_token() is None:
        raise GemmaAwqError("You are not logged in to the hub.", f"{LOGIN} The token needs write access.")
    return HfApi(library_name="gemma-awq", library_version=__version__)


def read_branch(api: "HfApi", repo: str, revision: str) -> Branch:
    """Return what the hub has of a repository's branch."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    with push_errors(repo, revision):
        try:
            info = api.model_info(repo, revision=revision)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError as error:
            if error.response.status_code == 401:
                raise
            return Branch()
        except RevisionNotFoundError:
            if revision.startswith("refs/"):
                raise
            return replace(read_branch(api, repo, MAIN), exists=False)
        return Branch(bool(info.private), info.sha, True, _list_files(api, repo, str(info.sha)))


def _list_files(api: "HfApi", repo: str, revision: str) -> dict[str, HubFile]:
    from huggingface_hub.hf_api import RepoFile

    try:
        files = {
            entry.path: HubFile(entry.size, entry.blob_id, entry.lfs.sha256 if entry.lfs is not None else None)
            for entry in api.list_repo_tree(repo, revision=revision, recursive=True)
            if isinstance(entry, RepoFile)
        }
    except (LookupError, TypeError, AttributeError):  # the client does not check the fields of an answer
        raise GemmaAwqError(f"The server that answered for {repo} is not a hub.", _ENDPOINT) from None
    for path in files:
        if not isinstance(path, str) or not _is_plain(path):
            raise GemmaAwqError(f"The hub lists a file of {repo} under an invalid name: {path!r}.", _ENDPOINT)
    return files


def _is_plain(path: str) -> bool:
    """Whether a path stays inside the repository and is printable."""
    return path.isprintable() and "\\" not in path and {"", ".", "..", ".git"}.isdisjoint(path.split("/"))


def has_edited_card(api: "HfApi", repo: str, branch: Branch) -> bool:
    """Whether a person wrote or changed the card that is on the hub."""
    if CARD not in branch.files or branch.commit is None:
        return False
    with push_errors(repo, branch.commit):
        path = api.hf_hub_download(repo, CARD, revision=branch.commit)
        return not is_unedited(Path(path).read_text(encoding="utf-8", errors="replace"))


def create_branch(api: "HfApi", repo: str, revision: str, private: bool, branch: Branch) -> str:
    """Create the repository and the branch where they are missing. Returns the commit that the branch is at."""
    with push_errors(repo, revision):
        if branch.private is None:
            api.create_repo(repo, private=True if private else None, exist_ok=False)
        if revision != MAIN:
            api.create_branch(repo, branch=revision, exist_ok=False)
        return str(api.model_info(repo, revision=revision).sha)


def commit_plan(
    api: "HfApi", repo: str, revision: str, parent: str, create_pr: bool, message: str, plan: UploadPlan
) -> Commit:
    """Send the plan's files in one commit on top of `parent`."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    additions = [CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file.content) for file in plan.sent]
    removals = [CommitOperationDelete(path_in_repo=name) for name in plan.removed]
    # One commit, unlike the client's `upload_folder`, which may publish a large folder in several: all files or none
    with push_errors(repo, revision):
        info = api.create_commit(
            repo,
            [*additions, *removals],
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=parent,
        )
    return Commit(info.oid, info.pr_revision or info.oid, info.pr_url)


def verify_files(api: "HfApi", repo: str, revision: str, files: Sequence[UploadFile]) -> int:
    """Compare the size and hash of every file on the hub with the local file's. Returns the number of files."""
    with push_errors(repo, revision):
        there: Mapping[str, HubFile] = _list_files(api, repo, revision)
    wrong = []
    for file in files:
        found = there.get(file.name)
        if found is None or not found.matches(file):
            wrong.append(f"{file.name} ({'missing' if found is None else f'{found.size} bytes, another hash'})")
    if wrong:
        raise GemmaAwqError(
            f"{repo} does not hold what was sent: {some(wrong, 3)}.",
            "Do not use it. Run the command again; if the error stays, something between here and the hub changes "
            "files.",
        )
    return len(files)


def page_url(api: "HfApi", repo: str, revision: str) -> str:
    """Return the address of a branch's page."""
    return f"{api.endpoint}/{repo}" + ("" if revision == MAIN else f"/tree/{quote(revision, safe='')}")
