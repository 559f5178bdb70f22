"""What a format must be able to do, so that every format is written, resumed, read back and published alike."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint


class Conversion(Protocol):
    """One checkpoint on its way into one format. Creating it reads headers only, and refuses what the format lacks.

    parts: the pieces of work, by names that never change; each is written and recorded as a whole, and holds one
    layer's tensors at most. nbytes: of all files that will be written. form: what was written, in a few words.
    tolerance: how far a stored weight may be from the source's, and why, as a sentence. notes: lines that the user
    should see.
    """

    parts: Sequence[str]
    nbytes: int
    form: str
    tolerance: str
    notes: Sequence[str]

    def begin(self, folder: Path, begun: bool) -> None:
        """Make the files in `folder`. begun: an earlier conversion of the same request made them; continue them."""

    def write(self, part: str) -> None:
        """Write the tensors of one part, and make sure that they are on the disk."""

    def finish(self) -> None:
        """Write what belongs beside the tensors: configs, tokenizer, licences."""

    def verify(self, part: str) -> float:
        """Read one part back from the finished files and compare every weight with the source's.

        Returns the largest difference of a packed weight, in units of its scale. Raises GemmaAwqError beyond the
        tolerance.
        """


@dataclass(frozen=True)
class Format:
    """One target of an export.

    refusal: why a checkpoint cannot become this format, as a clause, or None; asked before anything is written.
    convert: starts a conversion of a checkpoint that is not refused: its short name, for names of files, and the
    request's options.
    versions: of what else than this tool decides the bytes, by name.
    """

    name: str
    refusal: Callable[[Checkpoint, Mapping[str, Any]], str | None]
    convert: Callable[[Checkpoint, str, Mapping[str, Any]], Conversion]
    versions: Callable[[], dict[str, str]] = dict
