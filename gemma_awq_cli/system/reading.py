"""The bytes of regular files, read within bounds, and paths as people write them."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.system.failures import system_errors


def home_path(text: str) -> Path:
    """Return a path as people write it, with `~` replaced by the home folder; `~nobody` stays as it is."""
    return Path(os.path.expanduser(text))  # Path.expanduser would raise for an unknown user


def read_bytes(path: Path, hint: str, limit: int | None = None) -> bytes:
    """Return a regular file's bytes. Raises for more than `limit`, and for a device or a pipe, which may not end."""
    with system_errors(path, hint), open(path, "rb", opener=_open_regular) as file:
        size = os.fstat(file.fileno()).st_size
        if limit is not None and size > limit:
            raise GemmaAwqError(f"{path} has {size} bytes, more than the limit of {limit}.", hint)
        return file.read()


def require_regular(path: Path, hint: str) -> None:
    """Raise unless `path` is a regular file, or a link to one. Opens nothing."""
    with system_errors(path, hint):
        mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise GemmaAwqError(f"{path} is not a regular file.", hint)


def open_regular(path: Path, hint: str) -> BinaryIO:
    """Open a regular file for reading. Raises for a device or a pipe, which may not end."""
    with system_errors(path, hint):
        return open(path, "rb", opener=_open_regular)


def _open_regular(path: str, flags: int) -> int:
    # opening a pipe without a writer would block
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file")
    return descriptor
