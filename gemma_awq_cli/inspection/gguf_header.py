"""The header of a GGUF file: what it says of the model, and the types of its tensors. Nothing of the weights is read.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3. Read here rather than by the
library `gguf`, which makes an array of each of the quarter million tokens, and trusts the file's counts.
"""

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.files import REDOWNLOAD

MAGIC = b"GGUF"
HEADER_BYTES = 256 * 1024 * 1024
BLOCK = 1 << 20
LONGEST = 1 << 16  # bytes of a text that is kept; a chat template has 20 kB
MOST = 1 << 20  # tensors, keys; entries of an array are bounded by the header's bytes
LARGEST = 2**63 - 1
TOKENIZER = "tokenizer."
# Of a value by the format's number: struct's letter and its size.
_SCALARS = {
    0: ("B", 1), 1: ("b", 1), 2: ("H", 2), 3: ("h", 2), 4: ("I", 4), 5: ("i", 4), 6: ("f", 4), 7: ("?", 1),
    10: ("Q", 8), 11: ("q", 8), 12: ("d", 8),
}  # fmt: skip
_STRING, _ARRAY = 8, 9
TENSOR_TYPES: Mapping[int, str] = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
# general.file_type: what most tensors are
FILE_TYPES: Mapping[int, str] = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS",
    21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4_MOE",
}  # fmt: skip


@dataclass(frozen=True)
class GgufHeader:
    """values: keys with a number or a text; types: of the tensors, with how many there are of each; elements: of all
    tensors. Both are empty where the header was read up to the tokenizer only."""

    values: Mapping[str, Any]
    types: Mapping[str, int]
    elements: int | None


def read_gguf_header(read: Callable[[int, int], bytes], size: int, name: str, whole: bool) -> GgufHeader:
    """Read a header. read: (first byte, count) -> bytes; whole: also what lies behind the tokenizer, some MB in."""
    cursor = _Cursor(read, size, name)
    if cursor.take(4) != MAGIC:
        raise GemmaAwqError(f"{name} is not a GGUF file.", REDOWNLOAD)
    version = cursor.number("I")
    if version not in (2, 3):
        raise GemmaAwqError(f"{name} is GGUF version {version}; versions 2 and 3 are known.", REDOWNLOAD)
    tensors, keys = cursor.number("Q"), cursor.number("Q")
    if max(tensors, keys) > MOST:
        raise GemmaAwqError(f"{name}: its header counts {tensors} tensors and {keys} keys.", REDOWNLOAD)
    values: dict[str, Any] = {}
    for _ in range(keys):
        key = cursor.text()
        if key.startswith(TOKENIZER) and not whole:
            return GgufHeader(values, {}, None)
        value = _value(cursor, cursor.number("I"))
        if value is not None:
            values[key] = value
    if not whole:
        return GgufHeader(values, {}, None)
    types: dict[str, int] = {}
    elements = 0
    for _ in range(tensors):
        cursor.text()
        dimensions = cursor.number("I")
        if dimensions > 8:
            raise GemmaAwqError(f"{name}: a tensor has {dimensions} dimensions.", REDOWNLOAD)
        elements += math.prod(cursor.number("Q") for _ in range(dimensions))
        if elements > LARGEST:
            raise cursor.damaged()
        number = cursor.number("I")
        kind = TENSOR_TYPES.get(number, f"type {number}")
        types[kind] = types.get(kind, 0) + 1
        cursor.skip(8)
    return GgufHeader(values, types, elements)


def _value(cursor: "_Cursor", kind: int) -> Any:
    """A number or a text; None for an array, which is skipped."""
    if kind == _STRING:
        return cursor.text()
    if kind in _SCALARS:
        return cursor.number(_SCALARS[kind][0])
    if kind != _ARRAY:
        raise cursor.damaged()
    inner, count = cursor.number("I"), cursor.number("Q")
    if inner in _SCALARS:
        cursor.skip(count * _SCALARS[inner][1])
    elif inner == _STRING:
        cursor.skip_texts(count)
    else:
        raise cursor.damaged()
    return None


class _Cursor:
    """A place in the header, of which one block is held. Every length is compared with what is left of the file."""

    def __init__(self, read: Callable[[int, int], bytes], size: int, name: str) -> None:
        self._read, self._size, self._name = read, min(size, HEADER_BYTES), name
        self._block, self._first, self._at = b"", 0, 0

    def damaged(self) -> GemmaAwqError:
        return GemmaAwqError(f"{self._name}: its header is damaged or cut off.", REDOWNLOAD)

    def take(self, count: int) -> bytes:
        """The next bytes."""
        if self._at + count > self._size:
            raise self.damaged()
        if self._at + count > self._first + len(self._block):
            self._block, self._first = self._read(self._at, max(count, BLOCK)), self._at
        start = self._at - self._first
        found = self._block[start : start + count]
        if len(found) < count:
            raise self.damaged()
        self._at += count
        return found

    def skip(self, count: int) -> None:
        if self._at + count > self._size:
            raise self.damaged()
        self._at += count
        if self._at > self._first + len(self._block):
            self._block, self._first = b"", self._at

    def number(self, letter: str) -> Any:
        return struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}")))[0]

    def text(self) -> str:
        """The next text, its beginning if it is long."""
        length = self.number("Q")
        kept = self.take(min(length, LONGEST))
        self.skip(length - len(kept))
        return kept.decode(errors="replace")

    def skip_texts(self, count: int) -> None:
        if count > self._size:
            raise self.damaged()
        for _ in range(count):
            self.skip(int.from_bytes(self.take(8), "little"))
