"""Recognizing the folders that this tool wrote: artifacts, exports and unfinished work."""

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.inventory.entries import Entry, Kind
from gemma_awq_cli.models.checkpoints.files import read_json
from gemma_awq_cli.models.checkpoints.staging import REPORT
from gemma_awq_cli.reports.artifact_files import EXPORT
from gemma_awq_cli.reports.stored_documents import read_quantization_report

PARTIAL = ".partial"
LOCK = "lock"
STAGING = ("model", "state", LOCK, "model.gone", "state.gone")  # what unfinished work consists of
_LOOKED_AT = 10_000  # names of a folder in which artifacts are looked for


def entry_of(path: Path, name: str) -> Entry | None:
    """Return what a folder is; None if this tool did not write it. Follows no link."""
    path = Path(os.path.abspath(path))
    try:
        if not stat.S_ISDIR(path.lstat().st_mode):
            return None
        if path.name.startswith(".") and path.name.endswith(PARTIAL) and _is_staging(path):
            return Entry(Kind.unfinished, name, path, *measured([path]))
        for kind, mark in ((Kind.artifact, REPORT), (Kind.export, EXPORT)):
            if stat.S_ISREG(_mode(path / mark)):
                facts, problem = _facts(kind, path)
                return Entry(kind, name, path, *measured([path]), facts, problem)
    except OSError:
        return None
    return None


def entries_in(folder: Path) -> Iterator[Entry]:
    """Yield what the folder is itself, or else its subfolders that this tool wrote, by name."""
    whole = entry_of(folder, str(folder))
    if whole is not None:
        yield whole
        return
    try:
        with os.scandir(folder) as scan:
            names = sorted(each.name for each, _ in zip(scan, range(_LOOKED_AT), strict=False))
    except OSError:
        return
    for name in names:
        shown = str(folder / name)
        if (found := entry_of(folder / name, shown if os.path.dirname(shown) else f".{os.sep}{name}")) is not None:
            yield found


def measured(roots: Iterable[Path]) -> tuple[int, float]:
    """Return the bytes of all files in folders, each file once, and when one changed last. Follows no link."""
    total, latest, seen = 0, 0.0, set()
    for root in roots:
        for place in (root, *walk(root)):
            try:
                found = place.lstat()
            except OSError:
                continue
            latest = max(latest, found.st_mtime)
            if stat.S_ISREG(found.st_mode) and (found.st_dev, found.st_ino) not in seen:
                seen.add((found.st_dev, found.st_ino))
                total += found.st_size
    return total, latest


def walk(folder: Path, strict: bool = False) -> Iterator[Path]:
    """Yield everything below a folder, also if it is nested deeper than Python may recurse. Follows no link.

    strict: whether a folder that cannot be read raises OSError; otherwise it is left out.
    """
    unread = [folder]
    while unread:
        try:
            with os.scandir(unread.pop()) as scan:
                entries = list(scan)
        except OSError:
            if strict:
                raise
            continue
        for entry in entries:
            yield Path(entry.path)
            if entry.is_dir(follow_symlinks=False):
                unread.append(Path(entry.path))


def files_of(path: Path) -> list[tuple[str, int]]:
    """Return the names and bytes of a folder's regular files, sorted. Follows no link."""
    found = []
    for place in sorted(walk(path)):
        try:
            status = place.lstat()
        except OSError:
            continue
        if stat.S_ISREG(status.st_mode):
            found.append((place.relative_to(path).as_posix(), status.st_size))
    return found


def _mode(path: Path) -> int:
    try:
        return path.lstat().st_mode
    except FileNotFoundError:
        return 0


def _is_staging(path: Path) -> bool:
    names = set(os.listdir(path))
    return bool(names) and names <= set(STAGING) and LOCK in names


def _facts(kind: Kind, path: Path) -> tuple[dict[str, Any], str | None]:
    try:
        return (_of_artifact(path) if kind is Kind.artifact else _of_export(path)), None
    except GemmaAwqError as error:
        return {}, error.message


def _of_artifact(path: Path) -> dict[str, Any]:
    report = read_quantization_report(path)
    return {
        "model": report["source"]["model"], "revision": report["source"]["revision"],
        "family": report["source"]["model_type"], "bits": report["artifact"]["bits"],
        "group_size": report["artifact"]["group_size"], "quality": report["arguments"]["quality"],
        "calibration": report["calibration"]["text"], "kl": report["fidelity"]["kl"],
        "perplexity_16bit": report["fidelity"]["perplexity_16bit"],
        "perplexity_4bit": report["fidelity"]["perplexity_4bit"],
        "top1_agreement": report["fidelity"]["top1_agreement"], "finished": report["run"]["finished"],
        "gemma_awq": report["versions"]["gemma_awq"],
    }  # fmt: skip


def _of_export(path: Path) -> dict[str, Any]:
    document = read_json(path / EXPORT)
    source = document.get("source")
    name = source.get("name") if isinstance(source, dict) else None
    form, files = document.get("form"), document.get("files")
    if not isinstance(name, str) or not isinstance(form, str) or not isinstance(files, dict):
        raise GemmaAwqError(f"{path / EXPORT} is not the document of an export.", "Export the model again.")
    return {"model": name, "format": form, "files": sorted(str(each) for each in files)}
