"""The headers of safetensors files that stay on the hub: the first bytes of each file, and none of its weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.headers import (
    FIRST_BYTES,
    METADATA,
    TensorInfo,
    WeightFiles,
    find_weights,
    header_entry,
    merge_headers,
    read_header,
)
from gemma_awq_cli.models.checkpoints.hub import fetch_errors


@dataclass(frozen=True)
class HubWeights:
    """The weights of a repository whose other files have been fetched.

    repo: the hub id; commit: of the other files; sizes: of all files that the repository has, by name, in bytes.
    """

    repo: str
    commit: str
    sizes: Mapping[str, int]

    def find(self, folder: Path) -> WeightFiles:
        """Return the repository's one complete set of weights, as if it lay in `folder`, where the other files are."""
        return find_weights(folder, self.sizes)

    def read_headers(self, weights: WeightFiles) -> dict[str, TensorInfo]:
        """Return every tensor of a set by its name. Raises GemmaAwqError if the hub or its answer stands in the way."""
        return merge_headers(weights, self._read_header)

    def _read_header(self, file: Path) -> dict[str, TensorInfo]:
        read = partial(fetch_range, self.repo, self.commit, file.name)
        header, _ = read_header(file.name, self.sizes[file.name], read, FIRST_BYTES)
        return {name: header_entry(file, name, entry) for name, entry in header.items() if name != METADATA}


def weights_on_hub(repo: str, commit: str) -> HubWeights:
    """Return the weights of a repository at a commit. Asks the hub for the names and sizes of its files."""
    from huggingface_hub import HfApi

    with fetch_errors(repo, commit):
        info = HfApi().model_info(repo, revision=commit, files_metadata=True)
        return HubWeights(repo, commit, {file.rfilename: file.size or 0 for file in info.siblings or []})


def fetch_range(repo: str, commit: str, name: str, start: int, count: int) -> bytes:
    """Return at most `count` bytes of one file of the hub, fetched in a range request."""
    with fetch_errors(repo, commit):
        return _range(repo, commit, name, start, count)


def _range(repo: str, commit: str, name: str, start: int, count: int) -> bytes:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        get_session,
        hf_raise_for_status,
    )

    headers = {**build_hf_headers(), "Range": f"bytes={start}-{start + count - 1}"}
    parts, held = [], 0
    with get_session().stream(
        "GET", hf_hub_url(repo, name, revision=commit), headers=headers, follow_redirects=True
    ) as response:
        if response.status_code >= 400:
            response.read()
        hf_raise_for_status(response)
        if response.status_code != 206 and start:
            raise GemmaAwqError(
                f"The hub does not send parts of {repo}/{name}, so its headers cannot be read alone.",
                "Download the repository, and give its folder.",
            )
        for part in response.iter_bytes():
            parts.append(part)
            held += len(part)
            if held >= count:
                break
    return b"".join(parts)[:count]
