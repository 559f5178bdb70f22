"""The tensors of a model's safetensors files, read from the files' headers as far as they can be.

Unlike `models.checkpoints.headers`, which raises at the first thing that is wrong, this lists every problem and goes
on, accepts every dtype, and needs only ranges of the files.
"""

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeGuard

from gemma_awq_cli.errors import GemmaAwqError, some
from gemma_awq_cli.inspection.contents import Contents
from gemma_awq_cli.inspection.facts import Problem
from gemma_awq_cli.models.checkpoints.files import INDEX, REDOWNLOAD, SINGLE, read_json
from gemma_awq_cli.models.checkpoints.foreign import ADAPTER_CONFIG
from gemma_awq_cli.models.checkpoints.headers import FIRST_BYTES, read_header

MOST_FILES = 1000  # the largest released checkpoints have some dozens
AT_ONCE = 8  # requests
# Bytes per element by safetensors' name. Two 4-bit floats share a byte.
ELEMENT_BYTES: Mapping[str, float] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2,
    "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F4": 0.5,
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the header of its file has it. start: its first byte in the file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Stored:
    """All tensors by name, the texts of the headers' `__metadata__`, and what is wrong with the files."""

    files: tuple[str, ...]
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]
    problems: tuple[Problem, ...]


def read_stored(contents: Contents) -> Stored:
    """Read the headers of the files that make up the model."""
    problems: list[Problem] = []
    files, index = _files(contents, problems)
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, str] = {}
    if len(files) > MOST_FILES:
        problems.append(Problem(f"The model has {len(files)} files of weights; the first {MOST_FILES} are read."))
    with ThreadPoolExecutor(1 if contents.local else AT_ONCE) as pool:
        for name, (found, texts, wrong) in zip(
            files, pool.map(lambda name: _read_file(contents, name), files[:MOST_FILES]), strict=False
        ):
            problems += wrong
            if twice := sorted(found.keys() & tensors.keys()):
                where = f"{tensors[twice[0]].file} and {name}"
                problems.append(Problem(f"Stored both in {where}: {some(twice, 3)}.", REDOWNLOAD))
            tensors |= found
            metadata |= texts
    whole = {file for file in files if contents.has(file)}
    absent = sorted(name for name, file in index.items() if name not in tensors and file in whole)
    if absent:
        problems.append(Problem(f"{INDEX} names tensors that no file holds: {some(absent, 3)}.", REDOWNLOAD))
    return Stored(tuple(files), tensors, metadata, tuple(problems))


def _files(contents: Contents, problems: list[Problem]) -> tuple[list[str], dict[str, str]]:
    """The names of the files that make up the model, and the index."""
    held = sorted(name for name in contents.sizes if name.endswith(".safetensors") and "/" not in name)
    index: dict[str, str] = {}
    if contents.has(INDEX):
        try:
            weight_map = read_json(contents.folder / INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
                raise GemmaAwqError(f"{INDEX} has no weight_map of names.", REDOWNLOAD)
            index = weight_map
        except GemmaAwqError as error:
            problems.append(Problem(error.message, error.hint))
    named = sorted(set(index.values()))
    if absent := [name for name in named if not contents.has(name)]:
        problems.append(Problem(f"{INDEX} names files that are missing: {some(absent, 3)}.", REDOWNLOAD))
    files = [name for name in named if name in held]
    if not files:
        files = [SINGLE] if SINGLE in held else held
    elif SINGLE in held and SINGLE not in named:
        if absent:
            files, index = [SINGLE], {}
        else:
            problems.append(
                Problem(
                    f"Two sets of weights: {SINGLE}, and the files that {INDEX} names.",
                    f"Keep the one that is the model: remove {SINGLE}, or {INDEX} and its files.",
                )
            )
    left = [name for name in held if name not in files]
    if left and not contents.has(ADAPTER_CONFIG):
        problems.append(Problem(f"Not part of the model: {some(left, 3)}.", "Remove what does not belong to it."))
    return files, index


Read = tuple[dict[str, StoredTensor], dict[str, str], list[Problem]]


def _read_file(contents: Contents, name: str) -> Read:
    try:
        read = partial(contents.read, name)
        header, start = read_header(name, contents.sizes[name], read, 8 if contents.local else FIRST_BYTES)
    except GemmaAwqError as error:
        return {}, {}, [Problem(error.message, error.hint)]
    texts = header.pop("__metadata__", None)
    metadata = {key: text for key, text in texts.items() if isinstance(text, str)} if isinstance(texts, dict) else {}
    tensors, odd, end = {}, [], start
    for tensor, entry in header.items():
        found = _tensor(name, entry, start)
        if found is None:
            odd.append(tensor)
        else:
            tensors[tensor] = found
            end = max(end, found.start + found.nbytes)
    problems = []
    if odd:
        problems.append(Problem(f"{name}: the header's entries make no sense: {some(sorted(odd), 3)}.", REDOWNLOAD))
    if end > contents.sizes[name]:
        problems.append(
            Problem(f"{name} is cut off: it has {contents.sizes[name]} bytes, and its header needs {end}.", REDOWNLOAD)
        )
    elif end < contents.sizes[name] and not odd:
        extra = contents.sizes[name] - end
        problems.append(Problem(f"{name} has {extra} bytes that belong to no tensor.", REDOWNLOAD))
    return tensors, metadata, problems


def _tensor(file: str, entry: object, data: int) -> StoredTensor | None:
    """A header's entry checked; None if it makes no sense. data: where the file's data begin."""
    if not isinstance(entry, dict):
        return None
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        return None
    start, end = offsets
    wanted = ELEMENT_BYTES.get(dtype)
    if end < start or (wanted is not None and math.ceil(math.prod(shape) * wanted) != end - start):
        return None
    return StoredTensor(file, dtype[:40], tuple(shape), data + start, end - start)


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and len(value) <= 16 and all(type(one) is int and 0 <= one < 2**63 for one in value)
