"""Room for temporary files, or an error that says what to do where the system has none."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from gemma_awq_cli.reading import system_errors

_WHAT = "A temporary file"
_HINT = "Set TMPDIR to a folder that exists, can be written and has space."


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder that is gone afterwards."""
    with system_errors(_WHAT, _HINT, "created"):
        folder = tempfile.TemporaryDirectory(prefix="gemma-awq-", ignore_cleanup_errors=True)
    with folder as path:
        yield Path(path)


def scratch_file() -> IO[bytes]:
    """An open file without a name, gone when it is closed."""
    with system_errors(_WHAT, _HINT, "created"):
        return tempfile.TemporaryFile()
