"""A lock that can be removed with the folder that it is in.

The lock of a file is the file's, not its name's: whoever waits at a name may find that the file under it has been
removed, and that another process has locked a new one. So the file is removed while it is locked, and whoever has
locked one makes sure that it still has its name.
"""

import errno
import os
import sys
from contextlib import suppress
from pathlib import Path

# file systems without locks: nothing can be done there, and nobody is kept from working
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP)


class Lock:
    """An exclusive lock between processes. It ends with the process, however that ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def acquire(self) -> bool:
        """Take the lock; False if somebody else has it. FileNotFoundError if its folder is not there."""
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
        """Give the lock back, with its file if `remove`."""
        if self._descriptor is None:
            return
        descriptor, self._descriptor = self._descriptor, None
        try:
            if remove:
                with suppress(OSError):  # Windows removes no open file
                    self.path.unlink()
        finally:
            os.close(descriptor)
        if remove and sys.platform == "win32":
            with suppress(OSError):
                self.path.unlink()

    def is_held(self) -> bool:
        """Whether somebody has the lock now. Writes nothing."""
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
