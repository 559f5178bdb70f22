"""The adapter of a request: found, opened, and what its user should know before it is merged."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from gemma_awq_cli.errors import some
from gemma_awq_cli.models.checkpoints.adapter import Adapter, open_adapter
from gemma_awq_cli.models.checkpoints.side_files import TOKENIZER_FILES
from gemma_awq_cli.models.checkpoints.source import Source, find_adapter
from gemma_awq_cli.models.checkpoints.source_metadata import UNREADABLE, source_card
from gemma_awq_cli.system.reading import read_bytes

SIDE_BYTES = 200_000_000  # of a tokenizer's file that is compared


@dataclass(frozen=True)
class MergedAdapter:
    """An adapter that is merged into the source. card: what its own model card declares, or None without one."""

    source: Source
    adapter: Adapter
    card: dict[str, Any] | None


def open_asked_adapter(asked: str, revision: str | None) -> MergedAdapter:
    """Find and open the adapter that --adapter names. Raises for one that cannot be merged."""
    found = find_adapter(asked, revision)
    return MergedAdapter(found, open_adapter(found.folder), source_card(found.folder))


def adapter_warnings(merged: MergedAdapter, source: Source) -> Iterator[str]:
    """Yield what may be wrong about merging an adapter into `source`: another base model, a tokenizer of its own."""
    base = merged.adapter.config.base
    if base and _last(base) not in (_last(source.asked), _last(source.name), _last(str(source.folder.resolve()))):
        yield f"The adapter was trained on {base[:200]}, and is merged into {source.asked}. The shapes agree."
    own = [name for name in TOKENIZER_FILES if _differs(merged.source, source, name)]
    if own:
        yield (
            f"The adapter has {some(own)} of its own, other than the model's. The artifact gets the model's: copy the "
            "adapter's into the model's folder if it was trained with them."
        )
    if merged.card is not None and UNREADABLE in merged.card:
        yield f"The adapter's licence is not known: {merged.card[UNREADABLE]} `push` will ask for it."


def _last(name: str) -> str:
    return PurePath(name).name.lower()


def _differs(adapter: Source, model: Source, name: str) -> bool:
    ours, theirs = model.folder / name, adapter.folder / name
    if not theirs.is_file():
        return False
    hint = "Check its permissions."
    return not ours.is_file() or read_bytes(ours, hint, SIDE_BYTES) != read_bytes(theirs, hint, SIDE_BYTES)
