"""The bytes of regular files, read within bounds, and paths as people write them."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.system.failures import system_errors


def home_path(text: str) -> Path:
    """A path as people write it: `~` is the home folder. The home of nobody is a path that is not there."""
    return Path(os.path.expanduser(text))  # Path.expanduser raises for it


def read_bytes(path: Path, hint: str, limit: int | None = None) -> bytes:
    """A regular file's bytes, at most `limit`. A device or a pipe, which need not end, is an error."""
    with system_errors(path, hint), open(path, "rb", opener=_open_regular) as file:
        size = os.fstat(file.fileno()).st_size
        if limit is not None and size > limit:
            raise GemmaAwqError(f"{path} has {size} bytes; at most {limit} are read.", hint)
        return file.read()


def require_regular(path: Path, hint: str) -> None:
    """An error unless `path` is a regular file, through whatever links; opens nothing."""
    with system_errors(path, hint):
        mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise GemmaAwqError(f"{path} is not a regular file.", hint)


def open_regular(path: Path, hint: str) -> BinaryIO:
    """A regular file, open for reading; a device or a pipe, which need not end, is an error."""
    with system_errors(path, hint):
        return open(path, "rb", opener=_open_regular)


def _open_regular(path: str, flags: int) -> int:
    # a pipe without a writer would keep open() waiting
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file")
    return descriptor
