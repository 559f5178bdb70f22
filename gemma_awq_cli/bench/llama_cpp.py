"""A GGUF file as sessions, run by llama.cpp through llama-cpp-python's bindings; nothing else here touches them."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.forward.session import Logits
from gemma_awq_cli.system.extras import install_hint

PACKAGE = "llama_cpp"
BATCH = 512  # tokens that are read at a time: llama.cpp's own default


def require_llama_cpp() -> None:
    """Raise an error if llama-cpp-python is not installed."""
    if find_spec(PACKAGE) is None:
        raise GemmaAwqError("llama-cpp-python is not installed.", install_hint("llama-cpp"))


class LlamaModel:
    """A loaded GGUF file. capacity: the most tokens of a session, prompt and answer together."""

    def __init__(self, path: Path, capacity: int, threads: int) -> None:
        require_llama_cpp()
        import llama_cpp

        self.capacity = capacity
        try:
            self._llama = llama_cpp.Llama(
                str(path), n_ctx=capacity, n_batch=BATCH, n_threads=threads, n_threads_batch=threads, verbose=False
            )
        except (ValueError, OSError) as error:
            raise GemmaAwqError(
                f"llama.cpp cannot read {path}: {error}.", "Check that it is a complete GGUF file."
            ) from None
        self.vocabulary = int(self._llama.n_vocab())
        self.trained_context = int(llama_cpp.llama_model_n_ctx_train(self._llama.model))
        self.bos = int(self._llama.token_bos())
        name = str(self._llama.metadata.get("general.file_type", ""))
        self.description = f"GGUF file type {name}" if name else "GGUF"
        self.weight_bytes = int(llama_cpp.llama_model_size(self._llama.model))

    def ids(self, text: str) -> list[int]:
        """Return the token ids of plain text, without BOS."""
        ids: list[int] = self._llama.tokenize(text.encode(), add_bos=False, special=False)
        return ids

    def session(self, rows: int, capacity: int) -> "LlamaSession":
        """Return a new session, which ends the one before it: llama.cpp has one context."""
        if rows != 1:
            raise GemmaAwqError(
                "A GGUF file can only be measured with one prompt at a time.",
                "Leave this competitor out to measure other batch sizes.",
            )
        if capacity > self.capacity:
            raise ValueError(f"{capacity} tokens for a context of {self.capacity}")
        return LlamaSession(self._llama, self.vocabulary)


class LlamaSession:
    """A `models.forward.session.Session` of one row."""

    independent_rows = False

    def __init__(self, llama: Any, vocabulary: int) -> None:
        import llama_cpp

        self._c = llama_cpp
        self._context = llama.ctx
        self._vocabulary = vocabulary
        self._at = 0
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), True)

    def next_logits(self, tokens: Sequence[Sequence[int]]) -> Logits:
        """See `Session.next_logits`."""
        return self.last_logits(tokens, [1])

    def reset_row(self, row: int) -> None:
        raise NotImplementedError("a new session is as cheap")

    def repeat_row(self, rows: int) -> None:
        """See `Session.repeat_row`; there is only one row."""
        if rows != 1:
            raise ValueError("a GGUF session has one row")

    def last_logits(self, tokens: Sequence[Sequence[int]], counts: Sequence[int]) -> Logits:
        """See `Session.last_logits`."""
        (new,), (count,) = tokens, counts
        parts = []
        for first in range(0, len(new), BATCH):
            piece = new[first : first + BATCH]
            wanted = max(0, min(len(piece), first + len(piece) - (len(new) - count)))
            parts.append(self._decode(piece, wanted))
        return np.concatenate(parts)

    def _decode(self, piece: Sequence[int], wanted: int) -> Logits:
        """Read some tokens. Returns the logits [wanted, V] after the last `wanted` of them."""
        batch = self._c.llama_batch_init(len(piece), 0, 1)
        try:
            batch.n_tokens = len(piece)
            for index, token in enumerate(piece):
                batch.token[index] = token
                batch.pos[index] = self._at + index
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = 0
                batch.logits[index] = index >= len(piece) - wanted
            code = self._c.llama_decode(self._context, batch)
        finally:
            self._c.llama_batch_free(batch)
        if code:
            raise GemmaAwqError(f"llama.cpp could not decode (code {code}).", "Check that there is enough memory.")
        self._at += len(piece)
        if not wanted:
            return np.empty((0, self._vocabulary), np.float32)
        logits: Logits = np.ctypeslib.as_array(self._c.llama_get_logits(self._context), (wanted, self._vocabulary))
        return logits.copy()
