"""Errors of the hub explained in the user's terms, for fetching and for pushing.

The client's own text is left out where it may quote the request: addresses, headers, a token.
"""

import errno
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.system.failures import first_line

REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
UNUSABLE = (ValueError, TypeError, LookupError, AttributeError)  # the client's, when a hub's answer makes no sense
LOGIN = "Log in with `hf auth login`, or set HF_TOKEN."
OFFLINE = "HF_HUB_OFFLINE is set or --offline given"
_ELSEWHERE = "Give another repository or --revision, or a folder that holds the files."


def go_offline() -> None:
    """Keep every library of this process and of those that it starts from contacting the hub."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    if (constants := sys.modules.get("huggingface_hub.constants")) is not None:  # which has read the variable already
        constants.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]


@contextmanager
def fetch_errors(repo: str, revision: str | None) -> Iterator[None]:
    """Turn whatever keeps `repo` from being fetched into a clear error."""
    # the HTTP library of the installed client: httpx up to 1.x, httpx2 after it
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    try:
        with _malformed(repo):
            yield
    except (httpx.HTTPError, OSError, json.JSONDecodeError) as error:  # the client's own errors are all among these
        raise _fetch_explained(error, repo, revision) from None
    except UNUSABLE as error:  # file names that lead out of the cache, or a malformed answer
        raise _unusable(error, repo) from None


@contextmanager
def push_errors(repo: str, revision: str) -> Iterator[None]:
    """Turn whatever keeps `repo` from being written to into a clear error."""
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    try:
        with _malformed(repo):
            yield
    except (httpx.HTTPError, OSError, RuntimeError, ValueError) as error:
        # the client wraps what stops an upload in a RuntimeError, and reports an error of LFS as a ValueError
        raise _push_explained(error, repo, revision) from None


@contextmanager
def _malformed(repo: str) -> Iterator[None]:
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except HFValidationError:
        raise GemmaAwqError(
            f"{repo[:100]!r} cannot be a hub id.",
            "Check the name: letters, digits, - _ . but no -- or .., and no .git.",
        ) from None
    except UnicodeEncodeError as error:
        if error.encoding != "ascii":
            raise
        # raised for the Authorization header
        raise GemmaAwqError(
            "The hub token contains characters that no token can have.",
            "Set HF_TOKEN again, or log in with `hf auth login`.",
        ) from None


def _fetch_explained(error: BaseException, repo: str, revision: str | None) -> GemmaAwqError:
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled, RemoteEntryNotFoundError
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # not in the cache either: the reason is what kept the client from the hub
    if isinstance(error, RemoteEntryNotFoundError):
        return GemmaAwqError(f"The hub lists a file of {repo} that it does not have (HTTP 404).", _ELSEWHERE)
    if (refusal := _refusal(error, repo, revision)) is not None:
        return refusal
    is_offline = isinstance(error, LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE
    if is_offline or isinstance(error, OfflineModeIsEnabled):
        return GemmaAwqError(
            f"{repo} is not in the local cache, and {OFFLINE}.",
            "Unset HF_HUB_OFFLINE and leave out --offline, or give a folder.",
        )
    if _is_cut(error):
        return GemmaAwqError(
            f"The connection to the hub broke off while fetching {repo}.",
            "Run the command again: the files that arrived whole are kept.",
        )
    if isinstance(error, (httpx.HTTPError, ConnectionError, LocalEntryNotFoundError)):
        return GemmaAwqError(
            f"{repo} is not in the local cache, and the hub cannot be reached.",
            "Check the network (and HF_ENDPOINT), or give a local folder.",
        )
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return _unusable(error, repo)
    return GemmaAwqError(
        f"{repo} cannot be fetched: {error}.", "Check the free space and the permissions of the hub's cache (HF_HOME)."
    )


def _unusable(error: BaseException, repo: str) -> GemmaAwqError:
    reason = first_line(error).rstrip(".")
    return GemmaAwqError(f"The hub's answer about {repo} cannot be used: {reason}.", _ELSEWHERE)


def _push_explained(error: BaseException, repo: str, revision: str) -> GemmaAwqError:
    from huggingface_hub.errors import (
        BadRequestError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    again = "Run the command again: files that have arrived are not sent a second time."
    if isinstance(error, (RuntimeError, LocalEntryNotFoundError)) and error.__cause__ is not None:
        error = error.__cause__  # "Error while uploading ...": the cause is the reason
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status in (409, 412):
            return GemmaAwqError(
                f"Someone else changed {repo} in the meantime (HTTP {status}), so nothing was committed.",
                f"Look at what changed on {revision}, then run the command again.",
            )
        if status == 413:
            return GemmaAwqError(
                f"A file is larger than {repo} accepts (HTTP 413).",
                "Check the hub's file and storage limits for this account.",
            )
        if status == 401:
            return GemmaAwqError(f"The hub does not accept this login for {repo} (HTTP 401).", f"Check it. {LOGIN}")
        if status == 403:
            return GemmaAwqError(
                f"This login may not write to {repo} (HTTP 403).",
                "Push to an account or organization of your own with a token that can write, or propose the files with "
                "--create-pr.",
            )
        if isinstance(error, BadRequestError):
            return GemmaAwqError(
                f"The hub did not accept the request for {repo} (HTTP 400).", "Check REPO_ID, --revision and --message."
            )
        if status == 429 or status >= 500:
            return GemmaAwqError(f"The hub answered HTTP {status} for {repo}.", f"Try later. {again}")
    if (refusal := _refusal(error, repo, revision)) is not None:
        return refusal
    if isinstance(error, OfflineModeIsEnabled):
        return offline_push()
    if _is_cut(error) or isinstance(error, (httpx.WriteError, httpx.WriteTimeout)):
        return GemmaAwqError(f"The connection to the hub broke off while pushing to {repo}.", again)
    if isinstance(error, (httpx.HTTPError, ConnectionError)):
        return GemmaAwqError("The hub cannot be reached.", f"Check the network (and HF_ENDPOINT). {again}")
    return GemmaAwqError(f"{repo} cannot be pushed to: {_without_token(str(error))}", "Check the files and the hub.")


def offline_push() -> GemmaAwqError:
    """Return the error for a push that may not contact the hub."""
    return GemmaAwqError(f"Nothing can be pushed, because {OFFLINE}.", "Unset HF_HUB_OFFLINE and leave out --offline.")


def _refusal(error: BaseException, repo: str, revision: str | None) -> GemmaAwqError | None:
    """The error for a repository that does not exist or that the user may not access; None for any other trouble."""
    from huggingface_hub.errors import (
        FileMetadataError,
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):  # before RepositoryNotFoundError, which it is one of
        return GemmaAwqError(
            f"{repo} is gated, and this account has no access to it.",
            f"Accept its terms at https://huggingface.co/{repo}. {LOGIN}",
        )
    if isinstance(error, RevisionNotFoundError):
        return GemmaAwqError(
            f"{repo} has no revision {revision or 'main'!r}.", "Give an existing branch, tag or commit."
        )
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if isinstance(error, RepositoryNotFoundError) and status == 401:
            return GemmaAwqError(f"The hub does not show {repo} without a login.", f"Check the name. {LOGIN}")
        if isinstance(error, RepositoryNotFoundError):
            return GemmaAwqError(f"The hub has no repository {repo}.", f"Check the name. If it is private: {LOGIN}")
        if status in (401, 403):
            return GemmaAwqError(f"The hub refused access to {repo} (HTTP {status}).", f"Check the token. {LOGIN}")
        return GemmaAwqError(f"The hub answered HTTP {status} for {repo}.", "Try again later.")
    if isinstance(error, (FileMetadataError, json.JSONDecodeError)):
        return GemmaAwqError(
            f"The server that answered for {repo} is not a hub.", "Check HF_ENDPOINT, and any proxy or firewall."
        )
    return None


def _is_cut(error: BaseException) -> bool:
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    return isinstance(error, (httpx.ReadError, httpx.ReadTimeout, httpx.RemoteProtocolError))


def _without_token(text: str) -> str:
    return re.sub(r"hf_\w+", "hf_...", text)
