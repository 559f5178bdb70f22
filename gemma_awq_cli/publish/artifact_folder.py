"""The files of an artifact's folder: which of them are published, and what else in the folder stops a push.

A folder is published as a list of known files. Anything else in it stops the push, above all what looks like a secret.
"""

import re
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from gemma_awq_cli.errors import GemmaAwqError, some
from gemma_awq_cli.models.checkpoints.files import INDEX, SINGLE, read_json
from gemma_awq_cli.models.checkpoints.side_files import is_leftover, is_licence_file
from gemma_awq_cli.reports.artifact_files import is_artifact_file
from gemma_awq_cli.system.reading import read_bytes

# What the hub's own client leaves in a folder that it downloaded to. It is not uploaded.
HUB_LEFTOVERS = (".gitattributes", ".cache")
FILE_LIMIT = 50 * 10**9  # bytes: the hub's limit for one file
SMALL_LIMIT = 200 * 10**6  # bytes, for anything but weights: the largest tokenizer.json has 33 MB
NOT_SENT = "nothing was sent"

_SECRET_NAMES = re.compile(
    r".*\.env(\..*)?|\.?env(\..*)?|\.netrc|_netrc|\.git-credentials|\.npmrc|\.pypirc|\.htpasswd|\.pgpass|id_(rsa|ed25519|ecdsa|dsa)"
    r"|.*\.(pem|key|p12|pfx|kdbx|jks|keystore|ppk|asc|gpg|ovpn)|.*(credential|secret|password|passwd).*"
    r"|(.*[_.-])?(api[_-]?key|(hf|access|auth)?_?token)(\.(txt|json|ya?ml|toml))?",
    re.IGNORECASE,
)


def publishable_files(folder: Path, others: Collection[str] = ()) -> list[Path]:
    """Return the artifact's own files, sorted by name; raises if the folder holds anything else.

    others: names of files that another tool writes, and that belong to its models.
    """
    secrets, links, strays = [], [], []
    files = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        parts = PurePosixPath(name).parts
        if parts[0] in HUB_LEFTOVERS or any(map(is_leftover, parts)):
            continue
        if path.is_symlink():
            links.append(name)
        elif path.is_dir():
            continue
        elif _SECRET_NAMES.fullmatch(path.name) and not is_artifact_file(name, others):
            secrets.append(name)
        elif not is_artifact_file(name, others) or not path.is_file():
            strays.append(name)
        else:
            files.append(path)
    for names, what, hint in (
        (secrets, "what looks like a secret", "Move it out of the folder"),
        (links, "symbolic links", "Replace them with the files that they point to"),
        (strays, "files that are no part of an artifact", "Move them out of the folder"),
    ):
        if names:
            raise GemmaAwqError(f"{folder} holds {what}: {some(names)}.", f"{hint}; {NOT_SENT}.")
    for path in files:
        _require_size(path)
    return files


def _require_size(path: Path) -> None:
    size, limit = path.stat().st_size, FILE_LIMIT if path.suffix == ".safetensors" else SMALL_LIMIT
    if size > limit:
        raise GemmaAwqError(
            f"{path.name} has {size / 1e9:.1f} GB, above the limit of {limit / 1e9:.1f} GB for such a file.",
            "Quantize the model again: its weights are then written in files of 4 GB.",
        )


def system_leftovers(folder: Path) -> list[str]:
    """Return the names of files that an operating system left in an artifact's folder. They are not uploaded."""
    return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if is_leftover(path.name)]


def require_weights_in_index(folder: Path, files: list[Path]) -> None:
    """Raise for weight files that the index does not name: some readers load every safetensors file that they see."""
    weights = {path.name for path in files if path.suffix == ".safetensors"}
    index = folder / INDEX
    named = set(read_json(index)["weight_map"].values()) if index.is_file() else {SINGLE}
    if extra := sorted(weights - named):
        raise GemmaAwqError(
            f"{folder} holds weights that its index does not name: {some(extra)}.", "Move them out of the folder."
        )


def licence_files(files: list[Path]) -> dict[str, bytes]:
    """Return the licence files among an artifact's files, by name."""
    hint = f"Check the file's permissions; {NOT_SENT}."
    return {path.name: read_bytes(path, hint) for path in files if is_licence_file(path.name)}
