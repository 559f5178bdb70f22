"""A lock file that can be removed together with its folder.

A lock belongs to a file, not to its name: while one process waits for the lock, another may remove the file, and a
third may lock a new one of the same name. So a lock file is removed only while it is locked, and a process that has
locked a file then checks that the file still has its name.
"""

import errno
import os
import sys
from contextlib import suppress
from pathlib import Path

# on file systems without locks every process gets the lock, so that it can work at all
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP)


class Lock:
    """An exclusive lock between processes. The operating system releases it when the process ends, even by a crash."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def acquire(self) -> bool:
        """Take the lock. Returns False if another process has it; raises FileNotFoundError if its folder is missing."""
        assert self._descriptor is None, "a lock is taken once"
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if not _take(descriptor):
                    os.close(descriptor)
                    return False
                if _has_name(descriptor, self.path):
                    self._descriptor = descriptor
                    return True
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def release(self, remove: bool = False) -> None:
        """Release the lock, and remove its file if `remove`."""
        if self._descriptor is None:
            return
        descriptor, self._descriptor = self._descriptor, None
        try:
            if remove:
                with suppress(OSError):  # Windows cannot remove an open file
                    self.path.unlink()
        finally:
            os.close(descriptor)
        if remove and sys.platform == "win32":
            with suppress(OSError):
                self.path.unlink()

    def is_held(self) -> bool:
        """Whether a process has the lock now. Writes nothing."""
        try:
            descriptor = os.open(self.path, os.O_RDWR)
        except OSError:
            return False
        try:
            return not _take(descriptor)
        finally:
            os.close(descriptor)


def _take(descriptor: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return True
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            return False
        raise
    return True


def _has_name(descriptor: int, path: Path) -> bool:
    ours = os.fstat(descriptor)
    try:
        named = os.stat(path)
    except FileNotFoundError:
        return False
    return (ours.st_dev, ours.st_ino) == (named.st_dev, named.st_ino)
