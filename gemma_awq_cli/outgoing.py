"""What of an artifact's folder goes to the hub, byte by byte: what belongs there, and nothing that a user would regret.

A folder is published as a list of known files. Anything else in it stops the push, a secret before all.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from gemma_awq_cli.artifact import COPIED
from gemma_awq_cli.bench_document import BENCH
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.files import CONFIG, INDEX, SINGLE, read_json
from gemma_awq_cli.models.staging import REPORT
from gemma_awq_cli.recipes import public_name

CARD = "README.md"
KNOWN = (CONFIG, INDEX, SINGLE, "model-*-of-*.safetensors", REPORT, CARD, BENCH, *COPIED)
LICENCE_FILES = ("LICENSE*", "NOTICE*", "Notice*", "*TERMS*", "USE_POLICY*")
# What the hub's own client leaves in a folder that it downloaded; it does not go back.
HUB_LEFTOVERS = (".gitattributes", ".cache")
FILE_LIMIT = 50 * 10**9  # the hub's for one file
READ = 1 << 20

_SECRET_NAMES = re.compile(
    r"\.env(\..*)?|\.netrc|\.git-credentials|\.npmrc|\.pypirc|id_(rsa|ed25519|ecdsa|dsa)|.*\.(pem|key|p12|pfx|kdbx)"
    r"|.*(credential|secret|password).*|(.*[_.-])?(api[_-]?key|(hf|access|auth)?_?token)(\.(txt|json|ya?ml|toml))?",
    re.IGNORECASE,
)
_SECRET_TEXT = re.compile(
    rb"\bhf_[A-Za-z0-9]{30,}|\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_[A-Za-z0-9_]{40,}|\bAKIA[0-9A-Z]{16}\b"
    rb"|\bsk-[A-Za-z0-9_-]{40,}|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)


@dataclass(frozen=True)
class OutgoingFile:
    """One file of the repository: its name there, and a local file or bytes that are made here."""

    name: str
    content: Path | bytes

    @cached_property
    def size(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    @cached_property
    def sha256(self) -> str:
        """As the hub identifies a large file."""
        digest = hashlib.sha256()
        for block in self._blocks():
            digest.update(block)
        return digest.hexdigest()

    @cached_property
    def blob_id(self) -> str:
        """As git, and so the hub, identifies a small file."""
        digest = hashlib.sha1(f"blob {self.size}\0".encode(), usedforsecurity=False)
        for block in self._blocks():
            digest.update(block)
        return digest.hexdigest()

    def _blocks(self) -> Iterator[bytes]:
        if isinstance(self.content, bytes):
            yield self.content
            return
        with self.content.open("rb") as file:
            while block := file.read(READ):
                yield block


def require_publishable(folder: Path) -> list[Path]:
    """The artifact's own files, sorted by name; an error if anything else is in its folder."""
    secrets, links, strays = [], [], []
    files = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if PurePosixPath(name).parts[0] in HUB_LEFTOVERS:
            continue
        if path.is_symlink():
            links.append(name)
        elif path.is_dir():
            continue
        elif _SECRET_NAMES.fullmatch(path.name) and not _known(name):
            secrets.append(name)
        elif not _known(name) or not path.is_file():
            strays.append(name)
        else:
            files.append(path)
    if secrets:
        raise GemmaAwqError(
            f"{folder} holds what looks like a secret: {_some(secrets)}.",
            "Move it out of the folder; nothing was sent.",
        )
    if links:
        raise GemmaAwqError(
            f"{folder} holds symbolic links: {_some(links)}.", "Put the files themselves there; nothing was sent."
        )
    if strays:
        raise GemmaAwqError(
            f"{folder} holds files that are no part of an artifact: {_some(strays)}.",
            "Move them out of the folder; nothing was sent.",
        )
    for path in files:
        if path.stat().st_size > FILE_LIMIT:
            raise GemmaAwqError(
                f"{path.name} has {path.stat().st_size / 1e9:.1f} GB; the hub takes {FILE_LIMIT / 1e9:.0f} GB a file.",
                "Quantize the model again: its weights are then written in files of 4 GB.",
            )
        if path.suffix != ".safetensors" and _SECRET_TEXT.search(path.read_bytes()):
            raise GemmaAwqError(
                f"{path.name} holds what looks like an access token or a private key.",
                "Remove it from the file, and revoke it if others have seen it; nothing was sent.",
            )
    return files


def require_weights_named(folder: Path, files: list[Path]) -> None:
    """An error for weights that no index names: some readers load every safetensors file they see."""
    weights = {path.name for path in files if path.suffix == ".safetensors"}
    index = folder / INDEX
    named = set(read_json(index)["weight_map"].values()) if index.is_file() else {SINGLE}
    if extra := sorted(weights - named):
        raise GemmaAwqError(
            f"{folder} holds weights that its index does not name: {_some(extra)}.", "Move them out of the folder."
        )


def licence_files(files: list[Path]) -> dict[str, bytes]:
    """Name -> text of the licence files among an artifact's."""
    found = [path for path in files if any(PurePath(path.name).match(pattern) for pattern in LICENCE_FILES)]
    return {path.name: path.read_bytes() for path in found}


def published_report(report: Mapping[str, Any]) -> bytes:
    """The report as it is published: where it names files of this machine, their names without their folders."""
    published: dict[str, Any] = json.loads(json.dumps(report))
    published["source"]["model"] = source_name(report)
    for part in ("arguments", "fingerprint"):
        if isinstance(published.get(part), dict) and isinstance(published[part].get("calibration"), str):
            published[part]["calibration"] = calibration_name(published[part]["calibration"])
    return (json.dumps(published, indent=2, ensure_ascii=False) + "\n").encode()


def published_bench(bench: Mapping[str, Any]) -> bytes:
    """The bench as it is published: without the folders of this machine and what was left out."""
    published: dict[str, Any] = json.loads(json.dumps(bench))
    settings = published["settings"]
    settings["text"] = calibration_name(settings["text"])
    settings["reference"] = PurePath(settings["reference"]).name if settings["reference"] else None
    settings["compare"] = [PurePath(name).name for name in settings["compare"]]
    settings["tasks"] = [PurePath(name).name for name in settings.get("tasks", [])]
    for model in published["models"]:
        model["name"] = PurePath(model["name"]).name
        if model["fidelity"]:
            model["fidelity"]["reference"] = PurePath(model["fidelity"]["reference"]).name
    published["left_out"] = []
    return (json.dumps(published, indent=2, ensure_ascii=False) + "\n").encode()


def source_name(report: Mapping[str, Any]) -> str:
    """The source as a stranger may read it: a hub id or `demo` as it is, a local folder without what it lies in."""
    model = str(report["source"]["model"])
    return model if report["source"]["revision"] else PurePath(model).name or "model"


def calibration_name(asked: str) -> str:
    """What was asked to calibrate on: a recipe or data set as it is, a local file without its folder."""
    return public_name(asked)


def _known(name: str) -> bool:
    return "/" not in name and any(PurePosixPath(name).match(pattern) for pattern in KNOWN)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
