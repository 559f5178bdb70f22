"""tokenizer.json as a table of tokens, for a process that encodes one text and decodes its answer.

The tokenizers library takes a second to build a machine that encodes any text: it hashes the 514906 merges of a Gemma.
Here the file is only parsed, in a quarter of that time. For a text, the library gets the small part of the vocabulary
that can occur in it: all that BPE ever forms are pieces of the text, so that the ids are the same. Files for which this
does not hold, or which are not plain, have no table.
"""

import gc
import json
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer as Backend

MOST_CHARACTERS = 8192  # of a text; for longer ones, the whole machine pays
_REPLACEMENT = "\ufffd"  # what bytes that are no character yet decode to


class _Model(msgspec.Struct):
    type: str
    vocab: dict[str, int]
    merges: msgspec.Raw
    dropout: float | None = None
    unk_token: str | None = None
    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None
    fuse_unk: bool = False
    byte_fallback: bool = False
    ignore_merges: bool = False


class _Added(msgspec.Struct):
    id: int
    content: str
    single_word: bool
    lstrip: bool
    rstrip: bool
    normalized: bool
    special: bool


class _File(msgspec.Struct):
    version: str
    model: _Model
    added_tokens: list[_Added]
    normalizer: Any = None
    pre_tokenizer: Any = None
    decoder: Any = None


class TokenTable:
    """A tokenizer's tokens. ids: of each, added ones included; special: the special ones."""

    def __init__(self, file: _File, replaced: Sequence[tuple[str, str]]) -> None:
        self._file = file
        self._replaced = replaced
        self._merges: msgspec.Raw | None = file.model.merges
        self._encoded: dict[str, list[int]] = {}
        self._added = {added.content: added for added in file.added_tokens}
        self.ids = file.model.vocab
        self.ids.update((added.content, added.id) for added in file.added_tokens)
        self.special = frozenset(added.content for added in file.added_tokens if added.special)

    def has_added(self, tokens: Iterable[str]) -> bool:
        """Whether all of some tokens are added ones."""
        return all(token in self._added for token in tokens)

    @property
    def decoder(self) -> Any:
        """What the file states of its decoder."""
        return self._file.decoder

    @cached_property
    def tokens(self) -> dict[int, str]:
        """Every token by its id."""
        return {index: token for token, index in self.ids.items()}

    @cached_property
    def added_ids(self) -> frozenset[int]:
        """The ids of the added tokens."""
        return frozenset(added.id for added in self._added.values())

    @cached_property
    def _bytes(self) -> set[str]:
        """The tokens that every text may need: those of single bytes, and the one for what is unknown."""
        named = {f"<0x{byte:02X}>" for byte in range(256)} if self._file.model.byte_fallback else set()
        return {token for token in (*named, self._file.model.unk_token) if token in self.ids}

    def encode(self, text: str) -> list[int] | None:
        """The ids of a text; None if it takes the whole machine: for a long text, and for a second one.

        The library's own errors are passed on.
        """
        if text in self._encoded:
            return list(self._encoded[text])
        if self._merges is None or len(text) > MOST_CHARACTERS:
            return None
        plain = text
        for old, new in self._replaced:
            plain = plain.replace(old, new)
        pieces = self._pieces(plain)
        added = [one for one in self._added.values() if one.content in text or one.content in plain]
        with _uncollected():
            merges = _merges_of(self._merges, pieces, self._bytes - pieces)
        self._merges = None  # a fifth of a gigabyte while they are parsed
        if merges is None:
            return None
        vocabulary = {token: self.ids[token] for token in (*self._bytes, *pieces, *(one.content for one in added))}
        ids: list[int] = self._backend(vocabulary, merges, added).encode(text, add_special_tokens=False).ids
        self._encoded[text] = ids
        return list(ids)

    def _pieces(self, plain: str) -> set[str]:
        """The tokens that are parts of a text."""
        longest = max(map(len, self.ids))
        size = len(plain)
        return {
            piece
            for first in range(size)
            for end in range(first + 1, min(first + longest, size) + 1)
            if (piece := plain[first:end]) in self.ids
        }

    def _backend(self, vocabulary: dict[str, int], merges: list[tuple[str, str]], added: list[_Added]) -> Any:
        """The library's tokenizer with a part of the vocabulary."""
        model = msgspec.structs.asdict(self._file.model) | {"vocab": vocabulary, "merges": merges}
        stated = {
            "version": self._file.version, "truncation": None, "padding": None,
            "added_tokens": [msgspec.structs.asdict(one) for one in added], "normalizer": self._file.normalizer,
            "pre_tokenizer": self._file.pre_tokenizer, "post_processor": None, "decoder": self._file.decoder,
            "model": model,
        }  # fmt: skip
        return Backend.from_str(json.dumps(stated))

    @cached_property
    def _decoder(self) -> Any:
        return self._backend({token: self.ids[token] for token in self._bytes}, [], []).decoder

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The text of token ids, as the library's tokenizer decodes them; ids without a token are left out."""
        tokens = [token for index in ids if (token := self.tokens.get(index)) is not None]
        if skip_special_tokens:
            tokens = [token for token in tokens if token not in self.special]
        text: str = " ".join(tokens) if self._decoder is None else self._decoder.decode(tokens)
        return text


class TableStream:
    """The library's `DecodeStream` for a table: tokens one by one, special ones left out."""

    def __init__(self, table: TokenTable) -> None:
        self._table = table
        self._ids: list[int] = []
        self._prefix = ""
        self._given = 0  # ids whose text is the prefix

    def step(self, token: int) -> str | None:
        """The text that one more token makes certain, or None. Where the library's raises an error, it waits."""
        self._ids.append(token)
        text = self._table.decode(self._ids, skip_special_tokens=True)
        if len(text.encode()) <= len(self._prefix.encode()) or text.endswith(_REPLACEMENT):
            return None
        if not text.startswith(self._prefix):  # bytes that are no characters have changed what was one
            return None
        new = text[len(self._prefix) :]
        self._ids = self._ids[self._given :]
        self._given = len(self._ids)
        self._prefix = self._table.decode(self._ids, skip_special_tokens=True)
        return new


def read_token_table(path: Path) -> TokenTable | None:
    """The table of a tokenizer.json; None if the file has to be read by the tokenizers library, or cannot be read."""
    try:
        with _uncollected():
            file = msgspec.json.decode(path.read_bytes(), type=_File)
    except (msgspec.MsgspecError, OSError, RecursionError, UnicodeError):
        return None
    model = file.model
    parts = (model.dropout, model.continuing_subword_prefix, model.end_of_word_suffix)
    replaced = _replacements(file.normalizer)
    plain = model.type == "BPE" and not any(parts) and replaced is not None and _only_splits(file.pre_tokenizer)
    if not plain or not _ids_as_stated(file) or not model.vocab:
        return None
    return TokenTable(file, replaced or ())


@contextmanager
def _uncollected() -> Iterator[None]:
    """Put off Python's search for garbage, which would go through half a million new tuples again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _ids_as_stated(file: _File) -> bool:
    """Whether the library gives every added token the id that the file states: its vocabulary's, or the next free."""
    free = len(file.model.vocab)
    for added in file.added_tokens:
        known = file.model.vocab.get(added.content)
        if added.id != (free if known is None else known):
            return False
        free += known is None
    return len({added.content for added in file.added_tokens}) == len(file.added_tokens)


def _replacements(normalizer: Any) -> list[tuple[str, str]] | None:
    """What a normalizer puts in place of single characters; None if it does anything else."""
    match normalizer:
        case None:
            return []
        case {"type": "Sequence", "normalizers": list(parts)}:
            found = [_replacements(part) for part in parts]
            return None if None in found else [pair for part in found for pair in part or ()]
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if len(old) == len(new) == 1:
            return [(old, new)]
    return None


def _only_splits(pre_tokenizer: Any) -> bool:
    """Whether a pre-tokenizer cuts a text and changes nothing in it."""
    match pre_tokenizer:
        case None | {"type": "Split"}:
            return True
        case {"type": "Sequence", "pretokenizers": list(parts)}:
            return all(map(_only_splits, parts))
    return False


def _merges_of(stored: msgspec.Raw, pieces: Set[str], others: Set[str]) -> list[tuple[str, str]] | None:
    """The merges, in their order, that form pieces of a text from pieces of it. None if they cannot be told.

    others: tokens that every text may need; a merge of one of them would form what is no piece of the text.
    """
    from gemma_awq_cli.models.text.merge_search import merges_between  # it imports numpy

    found = merges_between(stored, pieces | others)
    if found is None or any(not others.isdisjoint(pair) for pair in found):
        return None
    return [pair for pair in found if pair[0] + pair[1] in pieces]
