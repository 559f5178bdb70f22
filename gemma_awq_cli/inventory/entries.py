"""What is on the disk, as values."""

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any


class Kind(StrEnum):
    """artifact, export: a folder that this tool wrote; unfinished: what an interrupted run left to resume from;
    cache: a part of this tool's cache; hub: a model in the hub's cache, which other programs use too.
    """

    artifact = "artifact"
    export = "export"
    unfinished = "unfinished"
    cache = "cache"
    hub = "hub"


@dataclass(frozen=True)
class Entry:
    """name: what commands call it. bytes: on the disk. modified: seconds since 1970. facts: what else is known of it,
    by name; problem: why it cannot be read.
    """

    kind: Kind
    name: str
    path: Path
    bytes: int
    modified: float
    facts: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None

    @property
    def document(self) -> dict[str, Any]:
        """The entry as JSON."""
        return {
            "kind": self.kind.value, "name": self.name, "path": str(self.path), "bytes": self.bytes,
            "modified": round(self.modified), "facts": self.facts, "problem": self.problem,
        }  # fmt: skip
