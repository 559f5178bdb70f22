"""Files that the user names for results: checked before anything is computed, then written whole or not at all."""

import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.system.failures import disk_is_full, is_permission_error, reason_of, system_errors
from gemma_awq_cli.system.interruption import finishing
from gemma_awq_cli.system.reading import home_path

ELSEWHERE = "choose another folder with -o"
MOST_PARTS = 256  # of a path, because missing folders are created one inside another
_KINDS = (
    (stat.S_ISDIR, "a folder"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"), (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
)  # fmt: skip


@contextmanager
def write_errors(place: Path, elsewhere: str = ELSEWHERE) -> Iterator[None]:
    """Turn OSErrors raised while writing `place`, or below it, into clear errors.

    elsewhere: how the user can choose another place, as the end of a hint.
    """
    try:
        yield
    except OSError as error:
        message, hint = _explained(error, place, elsewhere)
        raise GemmaAwqError(message, hint) from error
    except ValueError as error:
        if "null" not in str(error):
            raise
        raise GemmaAwqError(f"{str(place)!r} is not a path: it holds a NUL character.", _upper(elsewhere)) from error


def _explained(error: OSError, place: Path, elsewhere: str) -> tuple[str, str]:
    if disk_is_full(error):
        return f"The disk of {place} is full.", f"Free some space, or {elsewhere}."
    # the error may be about another file than the one to be written
    named = error.filename if isinstance(error.filename, str) else str(place)
    hints = {
        errno.EFBIG: "Raise the limit (ulimit -f)",
        errno.EMFILE: "Raise the limit (ulimit -n)",
        errno.ENAMETOOLONG: "Give a shorter name",
    } | dict.fromkeys((errno.ENOTDIR, errno.EEXIST, errno.ENOENT, errno.ELOOP), "Check the path")
    hint = "Change its permissions" if is_permission_error(error) else hints.get(error.errno or 0, "Check the disk")
    return f"{named} cannot be written: {reason_of(error)}.", f"{hint}, or {elsewhere}."


@contextmanager
def errors_about(path: Path) -> Iterator[None]:
    """Let OSErrors about a temporary file beside `path` name `path`."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def _upper(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def scratch_errors() -> AbstractContextManager[None]:
    """Turn OSErrors in the folder for temporary files into clear errors."""
    return system_errors("The folder for temporary files", "Set TMPDIR to a folder with space for them.", "used")


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Create a folder for temporary files, which is removed afterwards."""
    with scratch_errors():
        folder = tempfile.TemporaryDirectory(prefix="gemma-awq-", ignore_cleanup_errors=True)
    with folder as name:
        yield Path(name)


def scratch_file() -> IO[bytes]:
    """Open a file without a name for temporary data. It is gone when it is closed."""
    with scratch_errors():
        return tempfile.TemporaryFile()


def local_path(path: Path, elsewhere: str) -> Path:
    """Return the path of a result, with `~` replaced by the home folder; raises for an unknown user's."""
    if len(path.parts) > MOST_PARTS:
        raise GemmaAwqError(f"The path {str(path)[:100]}... has {len(path.parts)} parts.", _upper(elsewhere))
    expanded = home_path(str(path))
    if str(expanded).startswith("~"):
        raise GemmaAwqError(f"{path}: there is no such user, or no home folder.", _upper(elsewhere))
    return expanded


def require_file_place(path: Path, elsewhere: str) -> None:
    """Raise unless a file can be written at `path`: in an existing folder, over nothing or over a regular file.

    A device, a pipe or a socket may not end, and cannot be replaced. Opens nothing.
    """
    with write_errors(path, elsewhere):
        try:
            there: os.stat_result | None = path.stat()
        except FileNotFoundError:
            if path.is_symlink():
                raise GemmaAwqError(f"{path} is a link that leads nowhere.", _upper(elsewhere)) from None
            there = None
        folder = path.absolute().parent
        if there is not None:
            if not stat.S_ISREG(there.st_mode):
                kind = next((name for is_kind, name in _KINDS if is_kind(there.st_mode)), "no file")
                raise GemmaAwqError(f"{path} is {kind}; a regular file is needed.", _upper(elsewhere))
            if any(os.path.samestat(there, stream) for stream in _standard_streams()):
                raise GemmaAwqError(f"{path} is where the command writes its own messages.", _upper(elsewhere))
        if not folder.is_dir():
            raise GemmaAwqError(f"The folder {folder} does not exist.", f"Create it first, or {elsewhere}.")
        if not os.access(folder if there is None else path, os.W_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def _standard_streams() -> Iterator[os.stat_result]:
    for number in range(3):
        with suppress(OSError):  # closed
            yield os.fstat(number)


def write_whole(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Write a file whole or not at all: an earlier file stays until the new one is on the disk.

    A link stays a link, and its target is replaced; a file keeps its mode, and a new one gets `mode` as far as the
    process's mask allows: at no time can others read what they may not. Raises OSError.
    """
    path = Path(os.path.realpath(path))
    with _beside(path, content, mode) as partial:
        with suppress(FileNotFoundError):
            partial.chmod(stat.S_IMODE(path.stat().st_mode))
        with finishing():
            partial.replace(path)
            sync_folder(path.parent)


def write_new(path: Path, content: bytes) -> None:
    """Write a file as `write_whole` does, but only where there is none. Raises FileExistsError, and other OSErrors."""
    if os.path.lexists(path):  # first, so that nothing is written beside it, in /dev for example
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    with _beside(path, content) as partial:
        try:
            os.link(partial, path)  # unlike a rename, replaces nothing
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            path.open("xb").close()
            partial.replace(path)


@contextmanager
def _beside(path: Path, content: bytes, mode: int = 0o666) -> Iterator[Path]:
    """Write a file with `content` to the same folder, under a free name, and remove what is left of it afterwards."""
    # short enough for a file name, and different in every process
    partial = path.with_name(f".{path.name[:32]}.{os.getpid()}.{os.urandom(4).hex()}.partial")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    try:
        with errors_about(path):
            with open(os.open(partial, flags, mode), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            yield partial
    finally:
        with suppress(OSError):
            partial.unlink()


@contextmanager
def appearing_whole(path: Path) -> Iterator[Path]:
    """Yield where to write a file of the tool's own. It appears under `path` when all of it is on the disk.

    After an error nothing does, and what was written is removed. Raises OSError.
    """
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb+") as file:  # Windows syncs only what is open for writing
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make sure that a rename in `folder` is on the disk, where the system supports that."""
    with suppress(OSError):  # Windows cannot open folders, and some file systems cannot sync them
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
