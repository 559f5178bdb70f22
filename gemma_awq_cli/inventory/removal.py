"""Removing what this tool wrote, file by file, so that nothing of anybody else's is lost."""

import os
import stat
import sys
from contextlib import suppress
from pathlib import Path

from gemma_awq_cli.errors import GemmaAwqError, some
from gemma_awq_cli.inventory.entries import Entry, Kind
from gemma_awq_cli.inventory.folders import LOCK, PARTIAL, walk
from gemma_awq_cli.models.checkpoints.files import CONFIG
from gemma_awq_cli.models.checkpoints.side_files import is_leftover
from gemma_awq_cli.models.checkpoints.staging import REPORT
from gemma_awq_cli.reports.artifact_files import EXPORT, is_artifact_file
from gemma_awq_cli.system.failures import reason_of
from gemma_awq_cli.system.interruption import finishing
from gemma_awq_cli.system.locking import Lock

KEPT = "nothing was removed"


def require_removable(entry: Entry, is_locked: bool = False) -> list[Path]:
    """Return the files of an entry, in the order in which they may go; raises if it must not be removed.

    is_locked: whether the caller has the lock of unfinished work, whose file then is not among them.
    """
    if entry.kind is Kind.hub:
        raise GemmaAwqError(
            f"{entry.name} is in the hub's cache, which other programs use too.",
            f"Remove it with: hf cache rm model/{entry.name}",
        )
    if not is_locked:
        _require_unused(entry)
    files, links, foreign = [], [], []
    for path in sorted(walk(entry.path, strict=True)):
        name = path.relative_to(entry.path).as_posix()
        mode = path.lstat().st_mode
        if is_locked and name == LOCK:
            continue
        if stat.S_ISLNK(mode):
            links.append(name)
        elif stat.S_ISREG(mode) and _is_own(entry, name):
            files.append(path)
        elif not stat.S_ISDIR(mode) or not _may_have_folders(entry):
            foreign.append(name)
    for names, what in ((links, "links"), (foreign, "what is not this tool's")):
        if names:
            raise GemmaAwqError(
                f"{entry.name} holds {what}: {some(names)}.", f"Move that away, or remove the folder yourself; {KEPT}."
            )
    # without its config no reader takes it for a model, and with its mark it is still known as this tool's
    marks = {CONFIG: 0, REPORT: 2, EXPORT: 2}
    return sorted(files, key=lambda path: marks.get(path.name, 1) if path.parent == entry.path else 1)


def remove(entry: Entry) -> None:
    """Remove an entry. Raises if it must not be removed, or if something of it stays."""
    place = entry.path
    lock = Lock(entry.path / LOCK) if entry.kind is Kind.unfinished else None
    try:
        if lock is not None and not lock.acquire():
            raise _being_written(entry)
        with finishing():
            for place in require_removable(entry, is_locked=lock is not None):
                place.unlink()
            for place in sorted((path for path in walk(entry.path, strict=True) if path.is_dir()), reverse=True):
                place.rmdir()
            place = entry.path
            if lock is not None:
                lock.release(remove=True)
            place.rmdir()
    except OSError as error:
        raise GemmaAwqError(
            f"{place} cannot be removed ({reason_of(error)}).", "Check its permissions, then remove the rest again."
        ) from error
    finally:
        if lock is not None:
            lock.release()


def _is_own(entry: Entry, name: str) -> bool:
    if is_leftover(os.path.basename(name)) or _may_have_folders(entry):
        return True
    if entry.kind is Kind.export:
        return name == EXPORT or name in entry.facts.get("files", ())
    return is_artifact_file(name)


def _may_have_folders(entry: Entry) -> bool:
    """Whether everything inside is this tool's, because nobody else has a reason to write there."""
    return entry.kind in (Kind.cache, Kind.unfinished)


def _require_unused(entry: Entry) -> None:
    own = entry.path if entry.kind is Kind.unfinished else entry.path.parent / f".{entry.path.name}{PARTIAL}"
    if Lock(own / LOCK).is_held():
        raise _being_written(entry)
    for process in _readers(entry.path):
        raise GemmaAwqError(f"Process {process} is using {entry.name}.", f"Wait for it, or stop it; {KEPT}.")


def _being_written(entry: Entry) -> GemmaAwqError:
    return GemmaAwqError(f"Another process is writing {entry.name}.", f"Wait for it, or stop it; {KEPT}.")


def _readers(folder: Path) -> list[int]:
    """The processes that have files of a folder mapped, as a running model has; known on Linux only."""
    if not sys.platform.startswith("linux"):
        return []
    inside = f"{os.path.realpath(folder)}{os.sep}".encode(errors="surrogateescape")
    found = []
    for path in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):  # another user's, or it has ended
            if inside in path.read_bytes():
                found.append(int(path.parent.name))
    return sorted(set(found) - {os.getpid()})
