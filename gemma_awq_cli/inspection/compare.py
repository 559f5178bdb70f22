"""What differs between two models: values of their configs, how they are quantized, their tensors and their side files.

The contents of tensors are compared where both lie on this machine, or where the hub's hashes answer for whole files.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.inspection.contents import Contents
from gemma_awq_cli.inspection.facts import ModelFacts, Names
from gemma_awq_cli.inspection.stored import Stored, StoredTensor, read_stored
from gemma_awq_cli.models.checkpoints.files import CONFIG, read_json
from gemma_awq_cli.models.checkpoints.side_files import SIDE_FILES

SCHEMA = 1
PIECE = 8 * 2**20  # bytes that are compared at a time
LONGEST = 200  # characters of a value
_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Difference:
    """A value of either model; None where the model does not have it."""

    name: str
    one: str | None
    other: str | None


@dataclass(frozen=True)
class Tensors:
    """Numbers of tensors, and the names of those that differ, with N for the index of a layer.

    different: in shape or dtype; other_bytes, equal: with the same shape and dtype, by their contents; not_compared:
    how many could not be compared without reading weights over the network.
    """

    only_one: Names
    only_other: Names
    different: tuple[Difference, ...]
    other_bytes: Names
    equal: int
    not_compared: int


@dataclass(frozen=True)
class Comparison:
    """Everything that differs between two models."""

    models: tuple[str, str]
    facts: tuple[Difference, ...]
    config: tuple[Difference, ...]
    tensors: Tensors
    files: tuple[Difference, ...]

    def document(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"schema": SCHEMA, **asdict(self)}

    @property
    def alike(self) -> bool:
        """Whether nothing differs, as far as it was compared."""
        tensors = self.tensors
        lists = (tensors.only_one.count, tensors.only_other.count, tensors.other_bytes.count)
        return not (any(lists) or tensors.different or self.config or self.files or self.facts)


def compare(
    one: Contents,
    other: Contents,
    facts: tuple[ModelFacts, ModelFacts],
    described: Callable[[ModelFacts], list[tuple[str, str]]],
    progress: Callable[[int, int], None],
) -> Comparison:
    """Compare two models. described: what of the facts to compare, as labels and values; progress: bytes of all bytes
    whose contents are compared."""
    a, b = (dict(described(found)) for found in facts)
    stored = (read_stored(one), read_stored(other))
    return Comparison(
        (one.asked, other.asked),
        tuple(_differences(a, b)),
        tuple(_differences(*(dict(_flat(_config(contents))) for contents in (one, other)))),
        _compare_tensors(one, other, *stored, progress),
        tuple(_compare_files(one, other)),
    )


def _config(contents: Contents) -> dict[str, Any]:
    try:
        return read_json(contents.folder / CONFIG) if contents.has(CONFIG) else {}
    except GemmaAwqError:  # a problem that the facts list
        return {}


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The values of nested objects under dotted names. Lists stay whole."""
    for key, item in value.items():
        name = f"{prefix}{key}"[:LONGEST]
        if isinstance(item, dict) and item:
            yield from _flat(item, f"{name}.")
        else:
            text = json.dumps(item, ensure_ascii=False)
            yield name, text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({_short_hash(text)})"


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]


def _differences(one: Mapping[str, str], other: Mapping[str, str]) -> Iterator[Difference]:
    for name in dict.fromkeys((*one, *other)):
        if one.get(name) != other.get(name):
            yield Difference(name, one.get(name), other.get(name))


def _compare_tensors(
    one: Contents, other: Contents, a: Stored, b: Stored, progress: Callable[[int, int], None]
) -> Tensors:
    shared = [name for name in a.tensors if name in b.tensors]
    same_kind = [name for name in shared if _kind(a.tensors[name]) == _kind(b.tensors[name])]
    kinds = Counter(
        (_pattern(name), _kind(a.tensors[name]), _kind(b.tensors[name]))
        for name in shared
        if _kind(a.tensors[name]) != _kind(b.tensors[name])
    )
    total, done, equal = sum(a.tensors[name].nbytes for name in same_kind), 0, 0
    other_bytes, unknown = [], 0
    compared = _Bytes(one, other)
    for name in same_kind:
        answer = compared(a.tensors[name], b.tensors[name])
        done += a.tensors[name].nbytes
        progress(done, total)
        if answer is None:
            unknown += 1
        elif answer:
            equal += 1
        else:
            other_bytes.append(name)
    return Tensors(
        _grouped(name for name in a.tensors if name not in b.tensors),
        _grouped(name for name in b.tensors if name not in a.tensors),
        tuple(Difference(_counted(name, number), x, y) for (name, x, y), number in kinds.items()),
        _grouped(other_bytes),
        equal,
        unknown,
    )


def _kind(info: StoredTensor) -> str:
    return f"{info.dtype} {list(info.shape)}"


def _pattern(name: str) -> str:
    return _INDEX.sub("N", name)


def _counted(name: str, number: int) -> str:
    return f"{name} ({number} tensors)" if number > 1 else name


def _grouped(names: Iterable[str]) -> Names:
    """Names of tensors, those that differ in an index only as one; the count is of the tensors."""
    counts = Counter(map(_pattern, names))
    listed = [_counted(name, number) for name, number in sorted(counts.items())]
    return Names(sum(counts.values()), Names.of(listed).first)


class _Bytes:
    """The comparison of two models' contents. Files whose hashes are equal are compared once."""

    def __init__(self, one: Contents, other: Contents) -> None:
        self._one, self._other = one, other
        self._files: dict[tuple[str, str], bool] = {}

    def __call__(self, a: StoredTensor, b: StoredTensor) -> bool | None:
        """Whether two tensors of one shape and dtype have the same bytes; None: it would take a download to know."""
        one, other = self._one, self._other
        if one.local and other.local:
            for at in range(0, a.nbytes, PIECE):
                count = min(PIECE, a.nbytes - at)
                if one.read(a.file, a.start + at, count) != other.read(b.file, b.start + at, count):
                    return False
            return True
        return True if a.start == b.start and self._same_file(a.file, b.file) else None

    def _same_file(self, a: str, b: str) -> bool:
        if (a, b) not in self._files:
            one, other = self._one, self._other
            method = (one.hashes.get(a) or other.hashes.get(b) or "").partition(":")[0]
            same_size = bool(method) and one.sizes[a] == other.sizes[b]
            hashes = {_hash(one, a, method), _hash(other, b, method)} if same_size else {None}
            self._files[a, b] = len(hashes) == 1 and None not in hashes
        return self._files[a, b]


def _compare_files(one: Contents, other: Contents) -> Iterator[Difference]:
    for name in sorted(SIDE_FILES & (one.sizes.keys() | other.sizes.keys())):
        if one.sizes.get(name) != other.sizes.get(name) or _hashes_differ(one, other, name):
            yield Difference(name, _size(one, name), _size(other, name))


def _size(contents: Contents, name: str) -> str | None:
    return f"{contents.sizes[name]} bytes" if contents.has(name) else None


def _hashes_differ(one: Contents, other: Contents, name: str) -> bool:
    known = one.hashes.get(name) or other.hashes.get(name) or "sha256:"
    method = known.partition(":")[0]
    found = {_hash(contents, name, method) for contents in (one, other)}
    return None not in found and len(found) > 1


def _hash(contents: Contents, name: str, method: str) -> str | None:
    """A file's hash by the hub's method for it: `sha256`, or `git` for a small file; None if it cannot be computed."""
    known = contents.hashes.get(name)
    if known is not None and known.startswith(f"{method}:"):
        return known
    path = contents.folder / name
    if not path.is_file():
        return None
    size = contents.sizes[name]
    digest = hashlib.sha256() if method == "sha256" else hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    try:
        for at in range(0, size, PIECE):
            digest.update(contents.read(name, at, PIECE))
    except GemmaAwqError:  # a link that leads out of the folder
        return None
    return f"{method}:{digest.hexdigest()}"
