"""Building a model folder so that nothing half-written ever looks complete, and nothing that a user had is lost.

A folder is built beside its final place, under a name that no reader takes for a model, and renamed when it is
complete. What an interrupted run may resume from stays there. Whoever makes, renames or removes anything there holds
the lock; anyone else only looks.
"""

import errno
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.system.interruption import finishing
from gemma_awq_cli.system.locking import Lock
from gemma_awq_cli.system.saving import ELSEWHERE, errors_about, sync_folder, write_errors

__all__ = ["ELSEWHERE", "REPORT", "StagedFolder", "require_space", "write_errors"]

REPORT = "quantization_report.json"
_BETWEEN = 1.0  # seconds of trying to make a folder that other processes keep removing


class StagedFolder:
    """A folder that appears at `target` complete, or not at all.

    While it is entered, `folder` is the model that will become `target`, and `state` beside it holds notes of whoever
    writes it. A non-empty `target` is an error unless `force` or `resume`, and is only replaced if it holds a model
    that this tool wrote; it stays in place until its successor is complete. Creating the object writes nothing.

    mark: the file that every folder written this way has, by which it is recognized as this tool's.
    is_worth_keeping: given `state`, whether unfinished work can be resumed. It decides what happens to the work of an
    interrupted run when the folder is entered, and to this run's work after an exception. By default all of it goes.
    """

    def __init__(
        self,
        target: Path,
        force: bool = False,
        resume: bool = False,
        elsewhere: str = ELSEWHERE,
        is_worth_keeping: Callable[[Path], bool] = lambda _: False,
        mark: str = REPORT,
    ) -> None:
        self.target = target
        self._mark = mark
        self.elsewhere = elsewhere
        self._is_worth_keeping = is_worth_keeping
        self.path = _path_of(target)
        self.folder, self.state = self.path / "model", self.state_of(target)
        self._replaced = target.parent / f".{target.name}.replaced"
        self._may_be_there = force or resume
        self._lock = Lock(self.path / "lock")
        self._abandoned = False
        with write_errors(self.target, self.elsewhere):
            self._require_place()

    @staticmethod
    def state_of(target: Path) -> Path:
        """Return the `state` of a target, for a process that works with the one that holds the lock."""
        return _path_of(target) / "state"

    def __enter__(self) -> Self:
        with write_errors(self.target, self.elsewhere):
            self._acquire()
            try:
                if _is_there(self._replaced) and not _is_there(self.target):
                    self._replaced.rename(self.target)  # killed between the two renames of a replacement
                self._require_place()  # another process may have finished since
                if not self._is_worth_keeping(self.state):
                    self._discard()
                self._make()
            except BaseException:
                self._let_go(remove=not self._is_worth_keeping(self.state))
                raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # a half-done removal or replacement is worse than waiting for a second
        with finishing():
            published = False
            try:
                if kind is None and not self._abandoned:
                    with write_errors(self.target, self.elsewhere):
                        self._publish()
                published = kind is None
            finally:
                self._let_go(remove=published or not self._is_worth_keeping(self.state))

    def begin_anew(self) -> None:
        """Remove the work of an interrupted run."""
        with finishing():
            self._discard()
            self._make()

    def abandon(self) -> None:
        """Leave `target` as it is, because it is complete already, and remove the unfinished work beside it."""
        self._abandoned = True

    def is_being_written(self) -> bool:
        """Whether another process holds the lock at this moment."""
        return self._lock.is_held()

    def size(self) -> int:
        """Return the bytes that unfinished work takes on the disk."""
        return sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file())

    def _require_place(self) -> None:
        """An error if `target` cannot become our folder, or holds something that must not be replaced."""
        target, hint = self.target, "Choose another folder with -o."
        if target.name in ("", "..") or os.path.ismount(target):
            what = "does not name a new folder" if target.name in ("", "..") else "is a mount point"
            raise GemmaAwqError(
                f"{target} {what}: a finished folder cannot be put in its place.",
                f"Give a folder in it: -o {target / 'NAME'}.",
            )
        with errors_about(target):
            _is_there(self._replaced)  # an error if this name, the longest one used, is too long
            _require_writable(target.absolute().parent)
        if not (names := self._names(hint)):
            return
        if not self._may_be_there:
            raise GemmaAwqError(
                f"{target} exists and is not empty.", "Choose another folder with -o, or replace it with --force."
            )
        if self._mark not in names:
            what = "an artifact" if self._mark == REPORT else "an export"
            raise GemmaAwqError(
                f"{target} is not {what} of this tool (it has no {self._mark}), so it is not replaced.",
                "Choose another folder with -o, or empty it yourself.",
            )

    def _names(self, hint: str) -> list[str]:
        """The names in `target`, or in its former self if a process was killed while replacing it."""
        for _ in range(1000):
            there = self._replaced if not _is_there(self.target) and _is_there(self._replaced) else self.target
            if not _is_there(there):
                return []
            try:
                return os.listdir(there)
            except FileNotFoundError:
                if self.target.is_symlink():
                    raise GemmaAwqError(f"{self.target} is a link that leads nowhere.", hint) from None
                time.sleep(0.001)  # a process is replacing it at this moment
            except NotADirectoryError:
                raise GemmaAwqError(f"{self.target} exists and is not a folder.", hint) from None
        return []

    def _acquire(self) -> None:
        deadline = time.monotonic() + _BETWEEN
        while True:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                taken = self._lock.acquire()
                break
            except (FileNotFoundError, FileExistsError):  # its last owner is just removing the folder
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.001)
        if not taken:
            raise GemmaAwqError(
                f"Another process is writing {self.target}.", f"Wait for it, stop it, or {self.elsewhere}."
            )

    def _make(self) -> None:
        for folder in (self.folder, self.state):
            folder.mkdir(parents=True, exist_ok=True)

    def _publish(self) -> None:
        for path in self.folder.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if _is_there(self.target):
            _remove(self._replaced)
            self.target.rename(self._replaced)
        try:
            self.folder.rename(self.target)
        except BaseException:
            if _is_there(self._replaced) and not _is_there(self.target):
                self._replaced.rename(self.target)
            raise
        sync_folder(self.target.parent)

    def _let_go(self, remove: bool) -> None:
        """Release the lock. It is removed last and while it is held: then nobody else can have it."""
        if remove:
            with suppress(OSError):  # what cannot be removed does no harm
                self._discard()
                if _is_there(self.target):
                    _remove(self._replaced)
        self._lock.release(remove)
        if remove:
            with suppress(OSError):  # another process may have begun between the two
                self.path.rmdir()

    def _discard(self) -> None:
        # the notes first: they must never describe files that are gone
        for path in (self.state, self.folder):
            gone = path.with_suffix(".gone")
            _remove(gone)
            if _is_there(path):
                path.rename(gone)
                _remove(gone)


def _path_of(target: Path) -> Path:
    """The folder beside `target` in which it is built."""
    return target.parent / f".{target.name}.partial"


def _require_writable(folder: Path) -> None:
    """OSError unless the nearest existing folder can be written to."""
    while not _is_there(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _is_there(path: Path) -> bool:
    """Whether anything has this name, even a broken link. Raises OSError for an impossible name."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _remove(path: Path) -> None:
    """Remove a folder and everything in it, or a link to one, as far as possible."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def require_space(folder: Path, needed: int, elsewhere: str = ELSEWHERE) -> None:
    """An error before anything is computed if `needed` bytes do not fit on the disk that will hold `folder`."""
    with write_errors(folder, elsewhere):
        free = free_space(folder)
    if needed > free:
        raise GemmaAwqError(
            f"{folder} needs {needed / 1e9:.2f} GB, but its disk has {free / 1e9:.2f} GB free.",
            f"Free some space, or {elsewhere}.",
        )


def free_space(folder: Path) -> int:
    """Return how many bytes are free on the disk that will hold `folder`. Raises OSError if that cannot be told."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free
