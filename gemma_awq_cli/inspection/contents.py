"""The files of a model, wherever they are: small ones in a local folder, and ranges of the large ones.

Of a model on the hub, only the small files are fetched. Weights are read in ranges, and a server that answers with a
whole file is left before it sends any of it.
"""

import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.files import CONFIG, INDEX, REDOWNLOAD, require_inside
from gemma_awq_cli.models.checkpoints.foreign import ADAPTER_CONFIG
from gemma_awq_cli.models.checkpoints.hub import fetch_errors
from gemma_awq_cli.models.checkpoints.hub_headers import fetch_range
from gemma_awq_cli.models.checkpoints.quantization_config import BESIDE
from gemma_awq_cli.models.checkpoints.source_metadata import README
from gemma_awq_cli.models.checkpoints.staging import REPORT
from gemma_awq_cli.models.text.template_files import JINJA, PROCESSOR_FILES
from gemma_awq_cli.system.failures import system_errors
from gemma_awq_cli.system.reading import open_regular

SMALL_BYTES = 32 * 1024 * 1024  # of a file that is fetched from the hub; the index of the largest Gemma has 3 MB
# Beside the weights, what is looked into. Whether others are there, the listing says.
SMALL_FILES = (
    CONFIG, INDEX, *BESIDE, REPORT, README, ADAPTER_CONFIG, "hf_quant_config.json",
    "recipe.yaml", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", JINJA,
    *PROCESSOR_FILES,
)  # fmt: skip


@dataclass(frozen=True)
class Contents:
    """The files of one model.

    asked: the user's name for it; where: its folder, or the hub id; folder: where its small files can be read; sizes:
    every file by its name; read: (name, first byte, count) -> at most that many bytes; hashes: names and hashes of
    contents, as far as they are known without reading; local: the folder itself holds the weights; notes: lines on how
    it was found that the user should see.
    """

    asked: str
    where: str
    folder: Path
    sizes: Mapping[str, int]
    read: Callable[[str, int, int], bytes]
    hashes: Mapping[str, str]
    local: bool
    revision: str | None = None
    notes: tuple[str, ...] = ()

    def has(self, name: str) -> bool:
        return name in self.sizes


def local_contents(folder: Path, asked: str, revision: str | None = None, notes: tuple[str, ...] = ()) -> Contents:
    """Return the contents of a local folder."""
    sizes = {}
    with system_errors(folder, "Check its permissions."):
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            try:
                info = entry.stat()
            except OSError:  # a link to nothing
                continue
            if stat.S_ISREG(info.st_mode):
                sizes[entry.name] = info.st_size

    def read(name: str, start: int, count: int) -> bytes:
        path = folder / name
        require_inside(folder, path)
        with open_regular(path, REDOWNLOAD) as file, system_errors(path, REDOWNLOAD):
            file.seek(start)
            return file.read(count)

    return Contents(asked, str(folder), folder, sizes, read, {}, local=True, revision=revision, notes=notes)


def hub_contents(repo: str, revision: str | None) -> Contents:
    """Return the contents of a hub repository, or of its copy in the hub's cache if the hub does not answer."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return _cached(repo, revision)
    try:
        return _remote(repo, revision)
    except GemmaAwqError as error:
        try:
            found = _cached(repo, revision, (f"{error.message} Its copy in the local cache is shown.",))
        except GemmaAwqError:
            raise error from None
        return found


def _cached(repo: str, revision: str | None, notes: tuple[str, ...] = ()) -> Contents:
    from huggingface_hub import snapshot_download

    with fetch_errors(repo, revision):
        # what is asked for has to be there: the weights need not
        asked = [CONFIG, ADAPTER_CONFIG]
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=asked, local_files_only=True))
    return local_contents(folder, repo, folder.name, notes)


def _remote(repo: str, revision: str | None) -> Contents:
    """The contents of a repository on the hub, with its small files fetched into the cache."""
    from huggingface_hub import HfApi, snapshot_download

    with fetch_errors(repo, revision):
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
        sizes, hashes = {}, {}
        for sibling in info.siblings or []:
            name, size, blob = sibling.rfilename, sibling.size, sibling.blob_id
            if isinstance(name, str):
                sizes[name] = size if isinstance(size, int) else 0
                lfs = getattr(sibling.lfs, "sha256", None)
                hashes[name] = f"sha256:{lfs}" if lfs else f"git:{blob}"
        wanted = [name for name in SMALL_FILES if name in sizes and sizes[name] <= SMALL_BYTES]
        # without names to fetch it would take everything
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted or [CONFIG]))
        commit = folder.name

    def read(name: str, start: int, count: int) -> bytes:
        return fetch_range(repo, commit, name, start, count)

    return Contents(repo, repo, folder, sizes, read, hashes, local=False, revision=commit)
