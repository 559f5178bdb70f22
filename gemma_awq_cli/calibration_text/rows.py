"""Calibration rows: the documents of a recipe as rows of tokens that each begin with BOS.

The documents of one source are joined and cut into windows of `seq_len - 1` tokens, so that no long document is dropped
and no short one is lost; every window then gets its own BOS. The seed alone decides which windows are taken; of a
source that holds far more than is needed, it also draws the part that is read at all.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gemma_awq_cli.calibration_text.document_forms import Document
from gemma_awq_cli.calibration_text.document_reading import BadRows, Reading, read_documents
from gemma_awq_cli.calibration_text.hub_dataset import read_dataset
from gemma_awq_cli.calibration_text.recipes import Recipe
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.text.prompter import Prompter, PromptError, located

# Characters that are drawn from a long source for each token that is needed. A token of prose has four, so the windows
# are taken from several times as much text as they hold.
DRAWN_PER_TOKEN = 16
DRAWN_AT_LEAST = 1 << 19
GROWTHS = 3  # how often four times as much is drawn, if that has too few tokens


@dataclass(frozen=True)
class Rows:
    """The token rows of a text.

    ids: [R, S] int64, each row from BOS, to calibrate on; heldout: [H, S] int64, to measure on; text_sha256,
    heldout_sha256: of their ids; description: what the text is, as the report shows it; notes: files that were left
    out; skipped: a sentence on rows of the text that could not be used, "" if there are none; added: how many of `ids`
    are another text's, see `with_rows_of`.
    """

    ids: Tensor
    heldout: Tensor
    text_sha256: str
    heldout_sha256: str
    description: str
    notes: tuple[str, ...] = ()
    skipped: str = ""
    added: int = 0


@dataclass(frozen=True)
class _Source:
    """One source's windows, how it was read, and the number of documents that were used."""

    windows: list[list[int]]
    reading: Reading
    documents: int


def build_rows(
    recipe: Recipe,
    prompter: Prompter,
    num_samples: int,
    seq_len: int,
    seed: int,
    heldout_samples: int,
    strict: bool = False,
) -> Rows:
    """Return the token rows of a recipe: `num_samples` rows of `seq_len` tokens to calibrate on, and held-out rows.

    Fewer rows if the text has no more; raises if it has not at least one of each. Rows of the text that cannot be used
    are skipped and counted, or raise if `strict`.
    """
    sources = _read_enough(recipe, prompter, num_samples, seq_len, seed, heldout_samples, strict)
    chosen = _shuffled_windows(sources, seed)
    if recipe.heldout is not None:
        reading = Reading(DRAWN_PER_TOKEN * heldout_samples * seq_len, bad=BadRows(strict))
        apart = _source(read_documents(recipe.heldout, reading), prompter, seq_len, reading)
        sources.append(apart)
        heldout = apart.windows[:heldout_samples]
    else:
        # the recipe has no held-out text: some windows are kept out of the calibration
        spare = min(heldout_samples, max(1, len(chosen) // 5))
        heldout, chosen = chosen[:spare], chosen[spare:]
    if not chosen or not heldout:
        raise _too_short(recipe, sources, len(chosen) + (0 if recipe.heldout else len(heldout)), seq_len)
    ids, heldout_ids = torch.tensor(chosen[:num_samples]), torch.tensor(heldout)
    notes = tuple(note for source in sources for note in source.reading.notes)
    return Rows(
        ids, heldout_ids, hash_rows(ids), hash_rows(heldout_ids), recipe.description(), notes, _skipped(sources)
    )


def with_rows_of(rows: Rows, recipe: Recipe, prompter: Prompter, count: int, seed: int) -> Rows:
    """Return `rows` with `count` rows of another recipe's text behind them, or with as many as it has."""
    seq_len = rows.ids.shape[1]
    sources = _read_enough(recipe, prompter, count, seq_len, seed, 0, strict=False)
    ids = torch.tensor(_shuffled_windows(sources, seed)[:count], dtype=torch.int64).view(-1, seq_len)
    return replace(with_more_rows(rows, ids, f"{len(ids)} rows of {recipe.name}"), added=len(ids))


def with_more_rows(rows: Rows, ids: Tensor, described: str) -> Rows:
    """Return `rows` with rows `ids` [R', S] behind those to calibrate on. described: what these are."""
    joined = torch.cat([rows.ids, ids])
    return replace(rows, ids=joined, text_sha256=hash_rows(joined), description=f"{rows.description} + {described}")


def _read_enough(
    recipe: Recipe, prompter: Prompter, num_samples: int, seq_len: int, seed: int, heldout_samples: int, strict: bool
) -> list[_Source]:
    """Read a recipe's sources, more of them as long as they have too few windows and there is more to read."""
    needed = max(num_samples + heldout_samples, 5 * heldout_samples)
    characters = max(DRAWN_AT_LEAST, DRAWN_PER_TOKEN * needed * seq_len)
    for _ in range(GROWTHS):
        sources = _read(recipe, prompter, num_samples, seq_len, seed, characters, strict)
        if all(s.reading.complete for s in sources) or sum(len(s.windows) for s in sources) >= needed:
            break
        characters *= 4
    return sources


def _shuffled_windows(sources: Sequence[_Source], seed: int) -> list[list[int]]:
    """Return all windows in the order that the seed decides, each source in proportion to its size."""
    rng = random.Random(seed)
    windows = [source.windows for source in sources]
    for own in windows:
        rng.shuffle(own)
    return _interleave(windows)


def _too_short(recipe: Recipe, sources: Sequence[_Source], windows: int, seq_len: int) -> GemmaAwqError:
    """Return the error for a text with too few windows; raises the reason if a source has no document at all."""
    for source in sources:
        if not source.documents:
            source.reading.bad.raise_if_any(recipe.name)
    bad, skipped = _bad(sources), _skipped(sources)
    most_are_bad = bad.count > sum(source.documents for source in sources)
    return GemmaAwqError(
        f"The calibration text {recipe.name!r} is too short: it has {windows * (seq_len - 1)} tokens in whole windows, "
        f"and at least two windows of {seq_len} are needed (one to calibrate, one to measure)."
        + (f" {skipped}" if skipped else ""),
        bad.first[0].hint if most_are_bad else "Give a longer text, or a smaller --seq-len.",
    )


def hash_rows(ids: Tensor) -> str:
    """Return the SHA-256 of token rows, as int64."""
    return hashlib.sha256(ids.to(torch.int64).numpy().tobytes()).hexdigest()


def _read(
    recipe: Recipe, prompter: Prompter, num_samples: int, seq_len: int, seed: int, characters: int, strict: bool
) -> list[_Source]:
    """Read every source of a recipe; of a long one about `characters`, drawn by the seed."""
    drawing = random.Random(f"documents {seed}")
    found = []
    for path in recipe.sources:
        reading = Reading(characters, drawing, recipe.column, bad=BadRows(strict))
        found.append(_source(read_documents(path, reading), prompter, seq_len, reading))
    if recipe.dataset is not None:
        reading = Reading(num_samples * seq_len * 8, column=recipe.column, bad=BadRows(strict))
        documents = read_dataset(recipe.dataset, reading.characters, reading.bad, recipe.column)
        found.append(_source(documents, prompter, seq_len, reading))
    return found


def _source(documents: Sequence[Document], prompter: Prompter, seq_len: int, reading: Reading) -> _Source:
    """Join the documents' tokens and cut them into rows of BOS and `seq_len - 1` tokens; drop an incomplete row."""
    tokens: list[int] = []
    separator = prompter.ids("\n\n")
    used = 0
    for document in documents:
        try:
            with located(document.where):
                ids = prompter.ids(rendered(document, prompter))
        except PromptError as error:  # the model cannot be given this one; the next may do
            reading.bad.add(error)
        else:
            tokens += ids + separator
            used += 1
    rows = []
    start = 0
    while start < len(tokens):
        # a window that begins with a conversation brings its own BOS
        head = [] if tokens[start] == prompter.bos else [prompter.bos]
        row = head + tokens[start : start + seq_len - len(head)]
        if len(row) == seq_len:
            rows.append(row)
        start += seq_len - len(head)
    return _Source(rows, reading, used)


def rendered(document: Document, prompter: Prompter) -> str:
    """Return a document as the model reads it: a conversation through the chat template, if the model has one."""
    content = document.content
    if isinstance(content, str):
        return content
    if not prompter.is_chat:
        return "\n\n".join(message["content"] for message in content)
    return prompter.chat(content, answer_next=False)


def _bad(sources: Sequence[_Source]) -> BadRows:
    bad = BadRows()
    for source in sources:
        bad.join(source.reading.bad)
    return bad


def _skipped(sources: Sequence[_Source]) -> str:
    """Return a sentence on the rows that could not be used, "" if there are none."""
    bad = _bad(sources)
    return bad.summary(sum(source.documents for source in sources)) if bad.count else ""


def _interleave(groups: Sequence[list[list[int]]]) -> list[list[int]]:
    """Return all windows in an order in which every prefix holds each source in proportion to its size."""
    placed = [((i + 0.5) / len(own), index, row) for index, own in enumerate(groups) for i, row in enumerate(own)]
    return [row for _, _, row in sorted(placed, key=lambda item: item[:2])]
