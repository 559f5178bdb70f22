"""What a push has to change on the hub: a comparison of the artifact with what a branch holds. No network."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.staging import REPORT
from gemma_awq_cli.publish.preparation import Prepared
from gemma_awq_cli.publish.upload_file import UploadFile
from gemma_awq_cli.reports.artifact_files import CARD

# What a reader may load as this model: older weights must not stay beside the new ones.
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
GGUF = "*.gguf"
FOREIGN_WEIGHTS = (*WEIGHTS, "*.bin", GGUF, "*.pt", "*.pth")


@dataclass(frozen=True)
class HubFile:
    """A file as the hub lists it. size: bytes; sha256: of a large file; for a small one blob_id is its git hash."""

    size: int
    blob_id: str
    sha256: str | None

    def matches(self, file: UploadFile) -> bool:
        """Whether the local file has the same size and hash."""
        if self.size != file.size:
            return False
        return self.sha256 == file.sha256 if self.sha256 is not None else self.blob_id == file.blob_id


@dataclass(frozen=True)
class Branch:
    """What the hub has of a branch.

    private: of the repository, None if it does not exist yet. exists: whether the branch does; if not, commit and files
    are those of the main branch, from which it will start.
    """

    private: bool | None = None
    commit: str | None = None
    exists: bool = False
    files: Mapping[str, HubFile] = field(default_factory=dict)


@dataclass(frozen=True)
class UploadPlan:
    """What a push is about to change, for the user to confirm.

    creates: the repository is new; sent: files to upload; removed: names of files to delete; card_kept: the card on the
    hub was edited by hand and stays.
    """

    creates: bool
    private: bool
    sent: tuple[UploadFile, ...]
    removed: tuple[str, ...]
    card_kept: bool

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.sent)


def plan_upload(prepared: Prepared, branch: Branch, card_edited: bool, replace_card: bool, private: bool) -> UploadPlan:
    """Return the changes after which the branch holds exactly this artifact; raises if it holds another model."""
    if private and branch.private is False:
        raise GemmaAwqError(
            f"{prepared.repo} is public, and --private does not change that.",
            "Make it private in its settings on the hub first, or push without --private.",
        )
    foreign = sorted(name for name in branch.files if _matches(name, FOREIGN_WEIGHTS))
    mine = {file.name: file for file in prepared.files}
    others = [name for name in foreign if _matches(name, WEIGHTS)]
    if others and not any(_matches(name, WEIGHTS) for name in mine):
        raise GemmaAwqError(
            f"{prepared.repo} holds weights that would stay beside the GGUF file of another push ({others[0]}).",
            "Push both with --formats awq,gguf, or the GGUF alone to a repository of its own.",
        )
    same = all(name in mine and branch.files[name].matches(mine[name]) for name in foreign)
    has_our_card = CARD in branch.files and not card_edited
    if foreign and REPORT not in branch.files and not same and not has_our_card:
        raise GemmaAwqError(
            f"{prepared.repo} already holds another model ({foreign[0]}, and no {REPORT}), which is not replaced.",
            "Push to another repository, or to another branch with --revision after removing the files there.",
        )
    keep = card_edited and not replace_card
    sent = tuple(
        file
        for file in prepared.files
        if not (keep and file.name == CARD)
        and not (file.name in branch.files and branch.files[file.name].matches(file))
    )
    replaced = (*WEIGHTS, GGUF) if any(_matches(name, (GGUF,)) for name in mine) else WEIGHTS
    removed = tuple(name for name in sorted(branch.files) if name not in mine and _matches(name, replaced))
    return UploadPlan(
        branch.private is None, private if branch.private is None else branch.private, sent, removed, keep
    )


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
