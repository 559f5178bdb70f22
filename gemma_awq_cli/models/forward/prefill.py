"""New tokens of several rows, cut into flat batches of bounded size: what bounds the memory of a long prompt.

The tokens of all rows of a batch lie one behind the other, without padding that could change anything.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

CHUNK = 512  # the most tokens that pass the layers at once, unless there are more rows


@dataclass(frozen=True)
class RowChunk:
    """Consecutive new tokens of one row: positions start .. start + count - 1."""

    row: int
    start: int
    count: int


@dataclass(frozen=True)
class FlatBatch:
    """Chunks that pass the layers together.

    ids: the chunks' tokens, one chunk behind the other; wanted: for each chunk, after how many of its last tokens the
    logits are asked for.
    """

    chunks: tuple[RowChunk, ...]
    ids: list[int]
    wanted: list[int]


def flat_batches(tokens: Sequence[Sequence[int]], lengths: Sequence[int], counts: Sequence[int]) -> Iterator[FlatBatch]:
    """The batches in which rows that hold `lengths` tokens already read `tokens`.

    counts: after how many of its last tokens the logits of each row are asked for.
    """
    for chunks in split_rows([len(new) for new in tokens], lengths):
        ids: list[int] = []
        wanted = []
        for chunk in chunks:
            first, end = chunk.start - lengths[chunk.row], chunk.start + chunk.count
            ids += tokens[chunk.row][first : first + chunk.count]
            row_end = lengths[chunk.row] + len(tokens[chunk.row])
            wanted.append(max(0, min(chunk.count, end - (row_end - counts[chunk.row]))))
        yield FlatBatch(tuple(chunks), ids, wanted)


def split_rows(counts: Sequence[int], lengths: Sequence[int]) -> list[list[RowChunk]]:
    """Cut `counts` new tokens of rows that hold `lengths` already into batches of at most CHUNK tokens.

    The chunks of each row come in order; rows of one token each stay together, however many they are.
    """
    batches: list[list[RowChunk]] = [[]]
    room = max(CHUNK, len(counts))
    for row, total in enumerate(counts):
        done = 0
        while done < total:
            if room == 0:
                batches.append([])
                room = CHUNK
            count = min(room, total - done)
            batches[-1].append(RowChunk(row, lengths[row] + done, count))
            done += count
            room -= count
    return batches
