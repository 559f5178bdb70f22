"""One file of a repository as it is uploaded: its name, its content, and the hashes that the hub knows it by."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

READ = 1 << 20  # bytes


@dataclass(frozen=True)
class UploadFile:
    """One file of the repository: its name there, and its content as a local file or as bytes made in memory."""

    name: str
    content: Path | bytes

    @cached_property
    def size(self) -> int:
        """Bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    @cached_property
    def sha256(self) -> str:
        """The hash by which the hub identifies a large file."""
        digest = hashlib.sha256()
        for block in self._blocks():
            digest.update(block)
        return digest.hexdigest()

    @cached_property
    def blob_id(self) -> str:
        """The hash by which git, and so the hub, identifies a small file."""
        digest = hashlib.sha1(f"blob {self.size}\0".encode(), usedforsecurity=False)
        for block in self._blocks():
            digest.update(block)
        return digest.hexdigest()

    def _blocks(self) -> Iterator[bytes]:
        if isinstance(self.content, bytes):
            yield self.content
            return
        with self.content.open("rb") as file:
            while block := file.read(READ):
                yield block
