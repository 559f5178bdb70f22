"""A Gemma tokenizer as the arrays of a GGUF file.

Gemma's is a SentencePiece BPE with byte fallback, which tokenizer.json describes by its vocabulary and a list of
merges. llama.cpp knows two forms: `llama`, where each piece has a score and the neighbours with the highest joint score
merge first, and, for Gemma 4, `gemma4`, which has the merges. The scores are the order in which the merges first make
a piece: the same order of merging.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.text.template_files import ChatTemplate
from gemma_awq_cli.models.text.tokenizer import COPY, load_tokenizer
from gemma_awq_cli.system.json_input import parse_json


class TokenType(IntEnum):
    """Of llama.cpp. A user-defined token is found in a text before the text is cut into pieces."""

    NORMAL = 1
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "▁"  # what the normalizer makes of a space
# Tokens that tokenizers do not mark as special and llama.cpp's converter takes for control tokens.
_CONTROL = re.compile(r"<unused\d+>|<\|.*\|>|<pad>|<mask>|<2mass>|\[@BOS@\]", re.DOTALL)
# Special tokens of Gemma 4 that llama.cpp's parser of answers must see in the text.
_VISIBLE = ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>",
            '<|"|>')  # fmt: skip
_NOT_MERGED = -1000.0


@dataclass(frozen=True)
class GgufTokenizer:
    """model: llama.cpp's name of the kind; merges: only of `gemma4`, each pair with a space between.

    special: `bos`, `eos`, `unk`, `pad` and `eot` -> id, of those that the tokenizer has.
    """

    model: str
    tokens: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    merges: Sequence[str]
    special: Mapping[str, int]
    chat_template: ChatTemplate | None


def gguf_tokenizer(folder: Path, vocabulary: int, with_merges: bool, end_of_turn: str) -> GgufTokenizer:
    """Return the tokenizer of a model folder for an embedding of `vocabulary` rows.

    Raises GemmaAwqError for a tokenizer of another kind than Gemma's.
    """
    tokenizer = load_tokenizer(folder)
    stored: Any = parse_json(tokenizer.backend.to_str(), f"The tokenizer of {folder}", COPY)
    model = stored["model"]
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        raise GemmaAwqError(
            f"The tokenizer of {folder} is not of Gemma's kind (BPE with byte fallback), and gguf has no form for it.",
            COPY,
        )
    pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
    made: dict[str, int] = {}
    for left, right in pairs:
        made.setdefault(left + right, len(made))
    tokens = [f"[PAD{index}]" for index in range(vocabulary)]
    scores = [_NOT_MERGED if with_merges else -float(len(made))] * vocabulary
    types = [int(TokenType.UNUSED)] * vocabulary
    for text, index in model["vocab"].items():
        if index < vocabulary:
            tokens[index] = text
            types[index] = TokenType.BYTE if _BYTE.fullmatch(text) else TokenType.NORMAL
            if text in made and not with_merges:
                scores[index] = -float(made[text])
    for token in stored["added_tokens"]:
        if (index := token["id"]) < vocabulary:
            tokens[index], types[index] = _added(token["content"], bool(token["special"]), with_merges)
            scores[index] = _NOT_MERGED
    special = {kind: tokenizer.special_id(f"{kind}_token") for kind in ("bos", "eos", "unk", "pad")}
    special["eot"] = tokenizer.id_of(end_of_turn)
    return GgufTokenizer(
        model="gemma4" if with_merges else "llama",
        tokens=tokens,
        scores=scores,
        types=types,
        merges=[f"{left} {right}" for left, right in pairs] if with_merges else (),
        special={kind: index for kind, index in special.items() if index is not None and index < vocabulary},
        chat_template=tokenizer.chat_template,
    )


def _added(text: str, special: bool, with_merges: bool) -> tuple[str, TokenType]:
    """Return how an added token is stored: llama.cpp looks for it in the text before spaces are replaced."""
    if with_merges and text in _VISIBLE:
        return text, TokenType.USER_DEFINED
    if special or _CONTROL.fullmatch(text):
        return text, TokenType.CONTROL
    return text.replace(_SPACE, " "), TokenType.USER_DEFINED
