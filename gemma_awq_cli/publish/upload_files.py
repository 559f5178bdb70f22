"""What of an artifact's folder goes to the hub, byte by byte: what belongs there, and nothing that a user would regret.

A folder is published as a list of known files. Anything else in it stops the push, a secret before all.
"""

import hashlib
import json
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from gemma_awq_cli.bench.document import BENCH
from gemma_awq_cli.calibration_text.recipes import public_name
from gemma_awq_cli.errors import GemmaAwqError, some
from gemma_awq_cli.models.checkpoints.files import CONFIG, INDEX, SINGLE, read_json
from gemma_awq_cli.models.checkpoints.hub import REPO_ID
from gemma_awq_cli.models.checkpoints.local_paths import (
    base_name,
    local_paths,
    mentioned_path,
    to_json,
    without_local_paths,
)
from gemma_awq_cli.models.checkpoints.side_files import (
    SIDE_FILES,
    VOCABULARIES,
    WEIGHT_FILE,
    is_leftover,
    is_licence_file,
)
from gemma_awq_cli.models.checkpoints.staging import REPORT
from gemma_awq_cli.publish.secret_search import find_secret
from gemma_awq_cli.system.failures import system_errors
from gemma_awq_cli.system.json_input import parse_json
from gemma_awq_cli.system.reading import read_bytes
from gemma_awq_cli.system.text_input import decode

CARD = "README.md"
# What the hub's own client leaves in a folder that it downloaded; it does not go back.
HUB_LEFTOVERS = (".gitattributes", ".cache")
FILE_LIMIT = 50 * 10**9  # the hub's for one file
SMALL_LIMIT = 200 * 10**6  # of what is no weights: the largest tokenizer.json has 33 MB
HEADER_LIMIT = 100 * 10**6  # safetensors' own
READ = 1 << 20
# The Terms as Google's site has them, with the keys of its own scripts, which every visitor gets
_PUBLIC_PAGES = frozenset(("152fbbb72940545ffbb8f6691a6a99a2dea5c357165248969fd72a9dae37fa9d",))
_EDIT = "Take it out of the file, or remove the file; nothing was sent."

_SECRET_NAMES = re.compile(
    r".*\.env(\..*)?|\.?env(\..*)?|\.netrc|_netrc|\.git-credentials|\.npmrc|\.pypirc|\.htpasswd|\.pgpass|id_(rsa|ed25519|ecdsa|dsa)"
    r"|.*\.(pem|key|p12|pfx|kdbx|jks|keystore|ppk|asc|gpg|ovpn)|.*(credential|secret|password|passwd).*"
    r"|(.*[_.-])?(api[_-]?key|(hf|access|auth)?_?token)(\.(txt|json|ya?ml|toml))?",
    re.IGNORECASE,
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
        parts = PurePosixPath(name).parts
        if parts[0] in HUB_LEFTOVERS or any(map(is_leftover, parts)):
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
            f"{folder} holds what looks like a secret: {some(secrets)}.",
            "Move it out of the folder; nothing was sent.",
        )
    if links:
        raise GemmaAwqError(
            f"{folder} holds symbolic links: {some(links)}.", "Put the files themselves there; nothing was sent."
        )
    if strays:
        raise GemmaAwqError(
            f"{folder} holds files that are no part of an artifact: {some(strays)}.",
            "Move them out of the folder; nothing was sent.",
        )
    for path in files:
        size, limit = path.stat().st_size, FILE_LIMIT if path.suffix == ".safetensors" else SMALL_LIMIT
        if size > limit:
            raise GemmaAwqError(
                f"{path.name} has {size / 1e9:.1f} GB; the hub takes {limit / 1e9:.1f} GB of such a file.",
                "Quantize the model again: its weights are then written in files of 4 GB.",
            )
    return files


def leftovers(folder: Path) -> list[str]:
    """What an operating system left in an artifact's folder, which is not sent."""
    return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if is_leftover(path.name)]


def outgoing_file(path: Path) -> tuple[OutgoingFile, list[str]]:
    """A file of an artifact as it is published, and the fields of it that lost a place of this machine."""
    if path.suffix != ".json" or path.name in VOCABULARIES:
        return OutgoingFile(path.name, path), []
    cleaned, changed = without_local_paths(_parsed(path.name, read_bytes(path, _EDIT)))
    return OutgoingFile(path.name, to_json(cleaned) if changed else path), changed


def require_nothing_private(files: Iterable[OutgoingFile]) -> None:
    """An error if anything that is about to be sent holds what looks like a secret, or names a place of a machine."""
    for file in files:
        if file.name.endswith(".safetensors"):
            _require_header_clean(file)
            continue
        data = file.content if isinstance(file.content, bytes) else read_bytes(file.content, _EDIT)
        if hashlib.sha256(data).hexdigest() in _PUBLIC_PAGES:
            continue
        is_json = file.name.endswith(".json")
        _require_no_secret(file.name, data, is_json, file.name in VOCABULARIES)
        if is_json:
            _require_no_paths(file.name, _parsed(file.name, data))
        elif file.name == CARD or file.name.endswith(".jinja"):
            _require_no_paths(file.name, decode(data, file.name))


def _parsed(name: str, data: bytes) -> Any:
    hint = "Copy the file of the original model again."
    return parse_json(decode(data, name, hint), name, hint)


def _require_header_clean(file: OutgoingFile) -> None:
    """The same of what a safetensors file says beside its tensors, and of their names."""
    header = _header(file)
    _require_no_secret(file.name, header, is_json=False, vocabulary=True)
    metadata = _parsed(file.name, header).get("__metadata__", {})
    _require_no_secret(file.name, json.dumps(metadata).encode(), is_json=True, vocabulary=False)
    _require_no_paths(file.name, metadata)


def _header(file: OutgoingFile) -> bytes:
    assert isinstance(file.content, Path), "weights are never made in memory"
    with system_errors(file.content, _EDIT), file.content.open("rb") as opened:
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length <= HEADER_LIMIT:
            raise GemmaAwqError(f"{file.name} has no safetensors header.", "Quantize the model again.")
        return opened.read(length)


def _require_no_secret(name: str, data: bytes, is_json: bool, vocabulary: bool) -> None:
    if (found := find_secret(data, is_json, vocabulary)) is not None:
        where = f" ({found.place})" if found.place else ""
        raise GemmaAwqError(
            f"{name} holds what looks like {found.what}{where}.",
            "Take it out of the file, and revoke it if others have seen it; nothing was sent.",
        )


def _require_no_paths(name: str, value: Any) -> None:
    """value: JSON, or a text that is no JSON."""
    places = [("", mentioned_path(value))] if isinstance(value, str) else local_paths(value)
    for field, place in places:
        if place is not None:
            raise GemmaAwqError(f"{name} names a place of a machine{f' in {field}' if field else ''}: {place}.", _EDIT)


def require_weights_named(folder: Path, files: list[Path]) -> None:
    """An error for weights that no index names: some readers load every safetensors file they see."""
    weights = {path.name for path in files if path.suffix == ".safetensors"}
    index = folder / INDEX
    named = set(read_json(index)["weight_map"].values()) if index.is_file() else {SINGLE}
    if extra := sorted(weights - named):
        raise GemmaAwqError(
            f"{folder} holds weights that its index does not name: {some(extra)}.", "Move them out of the folder."
        )


def licence_files(files: list[Path]) -> dict[str, bytes]:
    """Name -> text of the licence files among an artifact's."""
    return {path.name: read_bytes(path, _EDIT) for path in files if is_licence_file(path.name)}


def published_report(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report as it is published: where it names files of this machine, their names without their folders."""
    published: dict[str, Any] = json.loads(json.dumps(report))
    published["source"]["model"] = source_name(report)
    for part in ("arguments", "fingerprint"):
        if isinstance(published.get(part), dict) and isinstance(published[part].get("calibration"), str):
            published[part]["calibration"] = calibration_name(published[part]["calibration"])
    cleaned: dict[str, Any] = without_local_paths(published)[0]
    return cleaned


def published_bench(bench: Mapping[str, Any]) -> dict[str, Any]:
    """The bench as it is published: without the folders of this machine and what was left out."""
    published: dict[str, Any] = json.loads(json.dumps(bench))
    settings = published["settings"]
    settings["text"] = calibration_name(settings["text"])
    settings["reference"] = base_name(settings["reference"]) if settings["reference"] else None
    settings["compare"] = [base_name(name) for name in settings["compare"]]
    settings["tasks"] = [base_name(name) for name in settings.get("tasks", [])]
    for model in published["models"]:
        model["name"] = base_name(model["name"])
        if model["fidelity"]:
            model["fidelity"]["reference"] = base_name(model["fidelity"]["reference"])
            model["fidelity"]["text"] = calibration_name(model["fidelity"]["text"])
    published["left_out"] = []
    cleaned: dict[str, Any] = without_local_paths(published)[0]
    return cleaned


def source_name(report: Mapping[str, Any]) -> str:
    """The source as a stranger may read it: a hub id or `demo` as it is, a local folder without what it lies in."""
    model = str(report["source"]["model"])
    return model if report["source"]["revision"] and REPO_ID.fullmatch(model) else base_name(model)


def calibration_name(asked: str) -> str:
    """What was asked to calibrate on: a recipe or data set as it is, a local file without its folder."""
    return public_name(asked)


def _known(name: str) -> bool:
    """Whether a name, relative to an artifact's folder, is of a file that an artifact has."""
    own = name in (CONFIG, INDEX, SINGLE, REPORT, CARD, BENCH)
    return own or name in SIDE_FILES or WEIGHT_FILE.fullmatch(name) is not None
