"""Building a model folder so that nothing half-written ever looks whole, and nothing a user had is lost.

A folder is built beside its final place, under a name that no reader takes for a model, and renamed when it is
complete. What was worth keeping of an interrupted run stays there for a later one.
"""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout

from gemma_awq_cli.errors import GemmaAwqError

REPORT = "quantization_report.json"
ELSEWHERE = "choose another folder with -o"


@contextmanager
def write_errors(folder: Path, elsewhere: str = ELSEWHERE) -> Iterator[None]:
    """Turn the operating system's refusals while writing below `folder` into clear errors.

    elsewhere: what the user can do to have it written somewhere else.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message, hint = f"The disk of {folder} is full.", f"Free some space, or {elsewhere}."
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            message, hint = f"{folder} cannot be written: {error.strerror}.", f"Change its permissions, or {elsewhere}."
        elif error.errno in (errno.ENOTDIR, errno.EEXIST, errno.ENOENT):
            message, hint = f"{folder} cannot be a folder: {error.strerror}.", f"Check the path, or {elsewhere}."
        else:
            raise
        raise GemmaAwqError(message, hint) from error


class StagedFolder:
    """A folder that appears at `target` complete, or not at all.

    While it is entered, `folder` is what becomes `target`, and `state` beside it is what its maker notes for itself.
    An existing non-empty `target` is refused unless `force`, and then only replaced if it holds a model that this tool
    wrote; it stays in place until its successor is complete. What an earlier maker left is thrown away unless `resume`.
    On an exception everything goes, unless the maker has set `keep`.
    """

    def __init__(self, target: Path, force: bool = False, resume: bool = False, elsewhere: str = ELSEWHERE) -> None:
        self.target = target
        self.elsewhere = elsewhere
        self.resume = resume
        self.keep = False
        self.path = target.parent / f".{target.name}.partial"
        self.folder, self.state = self.path / "model", self.path / "state"
        self._replaced = target.parent / f".{target.name}.replaced"
        self._lock = FileLock(self.path / "lock", timeout=0)
        if self._replaced.is_dir() and not target.exists():
            self._replaced.rename(target)  # killed between the two renames of a replacement
        if target.exists() and not target.is_dir():
            raise GemmaAwqError(f"{target} exists and is not a folder.", "Choose another folder with -o.")
        if target.is_dir() and any(target.iterdir()):
            if not force and not resume:
                raise GemmaAwqError(
                    f"{target} exists and is not empty.", "Choose another folder with -o, or replace it with --force."
                )
            if not (target / REPORT).is_file():
                raise GemmaAwqError(
                    f"{target} is not an artifact of this tool (it has no {REPORT}), so it is not replaced.",
                    "Choose another folder with -o, or empty it yourself.",
                )

    def __enter__(self) -> Self:
        with write_errors(self.target, self.elsewhere):
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire()
            except Timeout:
                raise GemmaAwqError(
                    f"Another process is writing {self.target}.", f"Wait for it, stop it, or {self.elsewhere}."
                ) from None
            if not self.resume:
                self._discard()
            for folder in (self.folder, self.state):
                folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            with write_errors(self.target, self.elsewhere):
                if self.target.exists():
                    shutil.rmtree(self._replaced, ignore_errors=True)
                    self.target.rename(self._replaced)
                self.folder.rename(self.target)
        self._lock.release()
        if kind is None or not self.keep:
            self.remove()

    def size(self) -> int:
        """Bytes on the disk that an earlier maker left here."""
        if not self.resume or not self.path.is_dir():
            return 0
        return sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file())

    def remove(self) -> None:
        """Take away everything but `target`."""
        self._discard()
        for path in (self.path, self._replaced):
            shutil.rmtree(path, ignore_errors=True)

    def _discard(self) -> None:
        # the notes first: they must never speak of files that are gone
        for path in (self.state, self.folder):
            if path.exists():
                gone = path.with_suffix(".gone")
                shutil.rmtree(gone, ignore_errors=True)
                path.rename(gone)
                shutil.rmtree(gone, ignore_errors=True)


def require_space(folder: Path, needed: int, elsewhere: str = ELSEWHERE) -> None:
    """An error before anything is computed if `needed` bytes do not fit on the disk that will hold `folder`."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise GemmaAwqError(
            f"{folder} needs {needed / 1e9:.2f} GB, but its disk has {free / 1e9:.2f} GB free.",
            f"Free some space, or {elsewhere}.",
        )
