"""The files of a folder of texts: those that are read, and the names of those that are not."""

import os
from pathlib import Path

from gemma_awq_cli.calibration_text.document_files import HINT, kind_of
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.system.failures import system_errors

FILES = 100_000  # of one folder
# What lies beside data and is none: a data set's card, its licence, and what libraries write of it.
_NO_DATA = ("readme", "license", "licence", "dataset_info", "dataset_infos", "dataset_dict", "state")


def files_of(folder: Path) -> tuple[list[Path], list[str]]:
    """A folder's files that are read, in the order of their names, and the names of all others.

    Hidden files, kinds that are not read and links that lead out of the folder are left out.
    """
    files: list[Path] = []
    left: list[str] = []

    def fail(error: OSError) -> None:
        raise error

    with system_errors(folder, HINT):
        root = folder.resolve()
        for current, folders, names in os.walk(folder, onerror=fail):
            closed = [name for name in folders if name.startswith(".") or Path(current, name).is_symlink()]
            left += [f"{Path(current, name).relative_to(folder)}/" for name in closed]
            folders[:] = [name for name in folders if name not in closed]
            for path in (Path(current, name) for name in names):
                if _is_read(path, root):
                    files.append(path)
                else:
                    left.append(str(path.relative_to(folder)))
            if len(files) + len(left) > FILES:
                raise GemmaAwqError(f"{folder} holds more than {FILES} files.", "Name a smaller folder.")
    return sorted(files), sorted(left)


def _is_read(path: Path, root: Path) -> bool:
    if path.name.startswith(".") or kind_of(path) is None or path.name.lower().split(".")[0] in _NO_DATA:
        return False
    target = path.resolve()
    # the hub's cache keeps its files beside the snapshots, which link to them
    homes = [root, *(folder.parent / "blobs" for folder in (root, *root.parents) if folder.name == "snapshots")]
    return target.is_file() and any(home in target.parents for home in homes)
