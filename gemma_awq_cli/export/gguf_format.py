"""The format `gguf`, for llama.cpp and Ollama: one file that holds weights, tokenizer and chat template."""

import os
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.export.conversion import Format
from gemma_awq_cli.export.gguf_metadata import FILE_TYPES, add_model, add_tokenizer, architecture_of, family_refusal
from gemma_awq_cli.export.gguf_rows import Rows, compare, encode, rows_of
from gemma_awq_cli.export.gguf_tensors import GgufTensor, gguf_parts, kinds_of, size_refusal
from gemma_awq_cli.export.gguf_tokenizer import gguf_tokenizer
from gemma_awq_cli.export.ollama import modelfile
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.files import read_json
from gemma_awq_cli.models.checkpoints.journal import ANEW
from gemma_awq_cli.models.checkpoints.side_files import copy_side_files, is_licence_file, side_files
from gemma_awq_cli.system.extras import install_hint

NAME, MODELFILE, _GENERATION = "gguf", "Modelfile", "generation_config.json"
_ALIGNMENT = 32  # of the tensors, by default
_EXACT = "0: the blocks hold the same integers and float16 scales"
_COMPACT = (
    "2^-11 of zero point x scale, because Q4_1 has the product of the two, rounded to float16, in place of the zero "
    "point"
)


class GgufConversion:
    """Writes one GGUF file, its header first, then each part's tensors in their places."""

    def __init__(self, checkpoint: Checkpoint, name: str, options: Mapping[str, Any]) -> None:
        self._checkpoint, self._short = checkpoint, re.sub(r"[^\w.-]+", "-", name)
        architecture = str(architecture_of(checkpoint))
        self._architecture = architecture
        self._tensors = gguf_parts(checkpoint, architecture, bool(options["compact"]), str(options["head"]))
        kinds = kinds_of(self._tensors)
        self.parts: Sequence[str] = tuple(self._tensors)
        self.form: str = f"{' and '.join(kinds)}, {options['head']} head"
        self.tolerance = _COMPACT if "Q4_1" in kinds else _EXACT
        self._tokenizer = gguf_tokenizer(
            checkpoint.folder, checkpoint.vocabulary, architecture == "gemma4", checkpoint.family.end_of_turn
        )
        self._kinds = kinds
        self.file_name = f"{self._short}-{kinds[0]}.gguf"
        self.nbytes = sum(_padded(tensor.nbytes) for tensor in self._all())
        towers = "The file holds the language model: llama.cpp reads the towers from a file of their own (mmproj)."
        self.notes: Sequence[str] = (towers,) if checkpoint.companions() else ()

    def _all(self) -> list[GgufTensor]:
        return [tensor for tensors in self._tensors.values() for tensor in tensors]

    def begin(self, folder: Path, begun: bool) -> None:
        """Write the header, and give the file its size."""
        self._path = folder / self.file_name
        self._head = head = self._header(folder / "header.gguf")
        self._places, offset = {}, len(head)
        for tensor in self._all():
            self._places[tensor.name] = offset
            offset += _padded(tensor.nbytes)
        if begun:
            _require_begun(self._path, head, offset)
            return
        with self._path.open("wb") as file:
            file.write(head)
            file.truncate(offset)
            file.flush()
            os.fsync(file.fileno())

    def _header(self, scratch: Path) -> bytes:
        """Return everything before the first tensor. scratch: a file that is written by llama.cpp's library."""
        import gguf

        writer = gguf.GGUFWriter(scratch, self._architecture)
        add_model(writer, self._checkpoint, self._short, FILE_TYPES[self._kinds[0]])
        add_tokenizer(writer, self._tokenizer)
        for tensor in self._all():
            kind = gguf.GGMLQuantizationType[tensor.kind]
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        head = scratch.read_bytes()
        scratch.unlink()
        return head + bytes(_padded(len(head)) - len(head))

    def write(self, part: str) -> None:
        with self._path.open("r+b") as file:
            for tensor in self._tensors[part]:
                file.seek(self._places[tensor.name])
                for rows in rows_of(self._checkpoint, tensor):
                    file.write(encode(rows, tensor.kind).tobytes())
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Write the Modelfile and the licence's files."""
        _require_begun(self._path, self._head, self._path.stat().st_size)
        folder, gathered = self._path.parent, side_files(self._checkpoint.folder)
        copy_side_files({name: one for name, one in gathered.items() if is_licence_file(name)}, folder)
        generation = self._checkpoint.folder / _GENERATION
        text = modelfile(
            self.file_name,
            self._checkpoint.family.end_of_turn,
            self._tokenizer.chat_template is not None,
            read_json(generation) if generation.is_file() else {},
        )
        (folder / MODELFILE).write_text(text, encoding="utf-8", newline="\n")

    def verify(self, part: str) -> float:
        worst = 0.0
        with self._path.open("rb") as file:
            for tensor in self._tensors[part]:
                file.seek(self._places[tensor.name])
                for rows in rows_of(self._checkpoint, tensor):
                    count = _number(rows)
                    stored = np.frombuffer(file.read(count * tensor.row_bytes), np.uint8)
                    worst = max(worst, compare(rows, stored.reshape(count, -1), tensor))
        return worst


def _number(rows: Rows) -> int:
    return len(rows[0]) if isinstance(rows, tuple) else len(rows)


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _require_begun(path: Path, head: bytes, size: int) -> None:
    whole = path.is_file() and path.stat().st_size == size
    if whole:
        with path.open("rb") as file:
            whole = file.read(len(head)) == head
    if not whole:
        raise GemmaAwqError(f"{path} is missing or was changed since.", ANEW)


def _refusal(checkpoint: Checkpoint, options: Mapping[str, Any]) -> str | None:
    if (reason := family_refusal(checkpoint) or size_refusal(checkpoint, str(options["head"]))) is not None:
        return reason
    if find_spec("gguf") is None:
        raise GemmaAwqError(
            "Writing gguf needs llama.cpp's Python library, which is not installed.",
            install_hint("gguf"),
        )
    return None


def _versions() -> dict[str, str]:
    return {"gguf": version("gguf")}


GGUF_FORMAT = Format(NAME, _refusal, GgufConversion, _versions)
