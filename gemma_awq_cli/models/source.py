"""Where a model comes from: a local folder, a hub repository, or the embedded demo. Ends in a local folder."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.models.checkpoint import CONFIG

DEMO = "demo"
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Weights other than safetensors, and framework exports, stay on the hub.
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.md", "LICENSE*", "NOTICE*", "Notice*", "*TERMS*"]


@dataclass(frozen=True)
class Source:
    """A model on this machine: the folder, what the user called it, and a short name for files made from it."""

    folder: Path
    asked: str
    name: str
    revision: str | None = None


def find_source(asked: str, revision: str | None, note: Callable[[str], None]) -> Source:
    """The local folder of a MODEL argument, fetched or made if need be. `note` is told what takes long."""
    path = Path(asked).expanduser()
    if asked == DEMO:  # a folder of that name is ./demo
        if revision:
            raise UsageError("--revision goes with a hub id, and the demo model has none.")
        from gemma_awq_cli.models.demo import NAME, demo_checkpoint

        return Source(demo_checkpoint(note), DEMO, NAME)
    if path.is_dir():
        if revision:
            raise UsageError(f"--revision goes with a hub id, and {asked} is a local folder.")
        if not (path / CONFIG).is_file():
            raise GemmaAwqError(f"{path} has no {CONFIG}.", "Give a folder that holds a Hugging Face checkpoint.")
        return Source(path, asked, path.resolve().name)
    if path.exists():
        raise GemmaAwqError(f"{asked} is a file.", "Give the folder that holds the checkpoint, not a file in it.")
    if not _REPO_ID.fullmatch(asked):
        raise GemmaAwqError(
            f"{asked!r} is neither a folder nor a hub id.",
            "Give a checkpoint folder, a hub id such as google/gemma-3-1b-it, or demo.",
        )
    return Source(_fetch(asked, revision), asked, asked.split("/")[1], revision)


def _fetch(repo: str, revision: str | None) -> Path:
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    login = "Log in with `hf auth login`, or set HF_TOKEN."
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=_HUB_FILES))
    except GatedRepoError:
        raise GemmaAwqError(
            f"{repo} is gated, and this account has no access to it.",
            f"Accept its terms at https://huggingface.co/{repo}. {login}",
        ) from None
    except RevisionNotFoundError:
        raise GemmaAwqError(f"{repo} has no revision {revision!r}.", "Give a branch, tag or commit that exists.") from None
    except RepositoryNotFoundError as error:
        if _status(error) == 401:
            raise GemmaAwqError(f"The hub does not show {repo} without a login.", f"Check the name. {login}") from None
        raise GemmaAwqError(f"The hub has no repository {repo}.", f"Check the name. If it is private: {login}") from None
    except OfflineModeIsEnabled:
        raise GemmaAwqError(
            f"{repo} is not in the local cache, and HF_HUB_OFFLINE is set.", "Unset HF_HUB_OFFLINE, or give a folder."
        ) from None
    except (LocalEntryNotFoundError, httpx.HTTPError, ConnectionError) as error:
        # the hub client wraps what broke the connection, and may have met a refusal behind it
        cause = error.__cause__
        if isinstance(cause, HfHubHTTPError) and _status(cause) in (401, 403):
            raise GemmaAwqError(f"The hub refused access to {repo}.", login) from None
        raise GemmaAwqError(
            f"{repo} is not in the local cache, and the hub cannot be reached.",
            "Check the network (and HF_ENDPOINT), or give a local folder.",
        ) from None
    except HfHubHTTPError as error:
        if _status(error) in (401, 403):
            raise GemmaAwqError(f"The hub refused access to {repo} (HTTP {_status(error)}).", login) from None
        raise GemmaAwqError(f"The hub answered HTTP {_status(error)} for {repo}.", "Try again later.") from None


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)
