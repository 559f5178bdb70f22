"""Where a model comes from: a local folder, a hub repository, or the embedded demo. Ends in a local folder."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.models.checkpoint import CONFIG

DEMO = "demo"
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Weights other than safetensors, and framework exports, stay on the hub.
_HUB_FILES = [
    "*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.md", "LICENSE*", "NOTICE*", "Notice*", "*TERMS*",
]  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A model on this machine: the folder, what the user called it, and a short name for files made from it.

    revision: the commit of a hub repository, however it was asked for.
    """

    folder: Path
    asked: str
    name: str
    revision: str | None = None


def find_source(asked: str, revision: str | None, note: Callable[[str], None]) -> Source:
    """The local folder of a MODEL argument, fetched or made if need be. `note` is told what takes long."""
    if asked == DEMO:  # a folder of that name is ./demo
        if revision:
            raise UsageError("--revision goes with a hub id, and the demo model has none.")
        from gemma_awq_cli.models.demo import NAME, demo_checkpoint

        return Source(demo_checkpoint(note), DEMO, NAME)
    try:
        path = Path(asked).expanduser()
        is_folder, is_there = path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:  # no permission, too long for a name, the home of nobody
        raise GemmaAwqError(f"{asked} cannot be looked up: {error}.", "Give another folder, or a hub id.") from None
    if is_folder:
        if revision:
            raise UsageError(f"--revision goes with a hub id, and {asked} is a local folder.")
        if not (path / CONFIG).is_file():
            raise GemmaAwqError(f"{path} has no {CONFIG}.", "Give a folder that holds a Hugging Face checkpoint.")
        return Source(path, asked, path.resolve().name)
    if is_there:
        raise GemmaAwqError(f"{asked} is a file.", "Give the folder that holds the checkpoint, not a file in it.")
    if not _REPO_ID.fullmatch(asked):
        raise GemmaAwqError(
            f"{asked!r} is neither a folder nor a hub id.",
            "Give a checkpoint folder, a hub id such as google/gemma-3-1b-it, or demo.",
        )
    folder = _fetch(asked, revision)
    if not (folder / CONFIG).is_file():  # a repository of GGUF files or adapters, say
        raise GemmaAwqError(f"{asked} has no {CONFIG} on the hub.", "Give a repository with a safetensors checkpoint.")
    return Source(folder, asked, asked.split("/")[1], folder.name)


def _fetch(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    # the HTTP library of the installed client: httpx up to 1.x, httpx2 after it
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=_HUB_FILES))
    except HFValidationError:
        raise GemmaAwqError(
            f"{repo!r} cannot be a hub id.", "Check the name: letters, digits, - _ . but no -- or .., and no .git."
        ) from None
    except UnicodeEncodeError:  # of the Authorization header, which is ASCII
        raise GemmaAwqError(
            "The hub token holds characters that no token has.", "Set HF_TOKEN again, or log in with `hf auth login`."
        ) from None
    except (httpx.HTTPError, OSError, json.JSONDecodeError) as error:  # every error of the client's own is one of these
        raise _explained(error, repo, revision) from None


def _explained(error: BaseException, repo: str, revision: str | None) -> GemmaAwqError:
    """The client's error in the user's terms. Its own text stays out where it may quote the request."""
    from huggingface_hub.errors import (
        FileMetadataError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    login = "Log in with `hf auth login`, or set HF_TOKEN."
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # nothing in the cache to fall back on: what kept the client from the hub is the reason
    if isinstance(error, GatedRepoError):  # before RepositoryNotFoundError, which it is one of
        return GemmaAwqError(
            f"{repo} is gated, and this account has no access to it.",
            f"Accept its terms at https://huggingface.co/{repo}. {login}",
        )
    if isinstance(error, RevisionNotFoundError):
        return GemmaAwqError(f"{repo} has no revision {revision or 'main'!r}.", "Give a branch, tag or commit it has.")
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if isinstance(error, RepositoryNotFoundError) and status == 401:
            return GemmaAwqError(f"The hub does not show {repo} without a login.", f"Check the name. {login}")
        if isinstance(error, RepositoryNotFoundError):
            return GemmaAwqError(f"The hub has no repository {repo}.", f"Check the name. If it is private: {login}")
        if status in (401, 403):
            return GemmaAwqError(f"The hub refused access to {repo} (HTTP {status}).", f"Check the token. {login}")
        return GemmaAwqError(f"The hub answered HTTP {status} for {repo}.", "Try again later.")
    if isinstance(error, OfflineModeIsEnabled):
        return GemmaAwqError(
            f"{repo} is not in the local cache, and HF_HUB_OFFLINE is set.", "Unset HF_HUB_OFFLINE, or give a folder."
        )
    if isinstance(error, (FileMetadataError, json.JSONDecodeError)):
        return GemmaAwqError(f"What answered for {repo} is not a hub.", "Check HF_ENDPOINT, and any proxy or firewall.")
    if isinstance(error, (httpx.ReadError, httpx.ReadTimeout, httpx.RemoteProtocolError)):
        return GemmaAwqError(
            f"The connection to the hub broke off while fetching {repo}.",
            "Run the command again: the files that arrived whole are kept.",
        )
    if isinstance(error, (httpx.HTTPError, ConnectionError, LocalEntryNotFoundError)):
        return GemmaAwqError(
            f"{repo} is not in the local cache, and the hub cannot be reached.",
            "Check the network (and HF_ENDPOINT), or give a local folder.",
        )
    return GemmaAwqError(
        f"{repo} cannot be fetched: {error}.", "Check the free space and the permissions of the hub's cache (HF_HOME)."
    )
