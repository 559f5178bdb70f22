"""Grammars enforced while a model generates, by llguidance: tokens that would break the grammar are masked out.

A grammar is compiled once, for a model's vocabulary; each row that follows it has a `GrammarConstraint` of its own.
"""

import importlib.util
import json
import re
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.generate.grammar import JSON_SCHEMA, Grammar, GrammarError, has_finite_value
from gemma_awq_cli.generate.sampler import Constraint
from gemma_awq_cli.models.forward.session import Logits
from gemma_awq_cli.models.text.thoughts import CLOSES, OPENS
from gemma_awq_cli.models.text.tokenizer import Tokenizer
from gemma_awq_cli.models.text.tool_calls import FORMATS
from gemma_awq_cli.system.extras import install_hint
from gemma_awq_cli.system.failures import first_line

# White space between the values of JSON: a space, or a line break and the indent. Without a bound, a weak model may
# write nothing else.
SPACE = r"( |\n {0,32})"
MOST_SYMBOLS = 50_000  # of a compiled grammar
TRIED = 8  # first tokens that are tried: an object with too many properties at once fails with them
_SHOWN = 300  # characters of llguidance's message
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class GrammarCompiler:
    """Compiles grammars for one model.

    vocabulary: how many logits it has. ends: the tokens that end a text; a finished grammar leaves nothing else.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, ends: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._ends = sorted(ends)

    @property
    def available(self) -> bool:
        """Whether llguidance is installed."""
        return importlib.util.find_spec("llguidance") is not None

    @cached_property
    def _library(self) -> Any:
        """The module llguidance."""
        if not self.available:
            raise GemmaAwqError(
                "Schemas, grammars and forced tool calls need llguidance, which is not installed.",
                install_hint("grammar"),
            )
        import llguidance

        return llguidance

    @cached_property
    def _trie(self) -> Any:
        """llguidance's form of the vocabulary; it takes seconds to make."""
        if not self._ends:
            raise GemmaAwqError("This model has no end token, so that no grammar could end its text.")
        wrapper = self._library.TokenizerWrapper(_Vocabulary(self._tokenizer, self._vocabulary, self._ends))
        return self._library.LLTokenizer(wrapper, n_vocab=self._vocabulary, eos_token=self._ends)

    def prepare(self) -> None:
        """Do what takes seconds now, and not with the first grammar."""
        _ = self._trie

    def compile(self, grammar: Grammar) -> "CompiledGrammar":
        """Return a grammar ready for use. Raises GrammarError if it is wrong, too large, or nothing matches it."""
        library, trie = self._library, self._trie
        matcher_class = library.LLMatcher
        what = "JSON schema" if grammar.kind == JSON_SCHEMA else "grammar"
        try:
            if grammar.kind == JSON_SCHEMA:
                if not has_finite_value(json.loads(grammar.text)):
                    raise GrammarError(
                        "The JSON schema cannot be used: all that matches it contains itself, endlessly."
                    )
                options = {
                    "lenient": not grammar.strict, "coerce_one_of": not grammar.strict, "whitespace_flexible": True,
                    "whitespace_pattern": SPACE,
                }  # fmt: skip
                text = matcher_class.grammar_from_json_schema(grammar.text, overrides=options)
            else:
                text = matcher_class.grammar_from_lark(grammar.text)
        except ValueError as error:  # such as a nesting that is too deep
            raise GrammarError(f"The {what} cannot be used: {first_line(error)}.") from None
        limits = library.LLParserLimits(max_grammar_size=MOST_SYMBOLS, verbose_errors=False)
        matcher = matcher_class(trie, text, log_level=0, limits=limits)
        if not matcher.is_error():
            mask = matcher.compute_bitmask()
        if matcher.is_error():
            raise GrammarError(f"The {what} cannot be used: {_reason(matcher)}.")
        if not any(mask):
            raise GrammarError(f"The {what} cannot be used: nothing matches it.")
        for token in np.flatnonzero(_allowed(mask, self._vocabulary))[:TRIED].tolist():
            tried = matcher.deep_copy()
            if not tried.consume_token(token):
                raise GrammarError(f"The {what} cannot be used: {_reason(tried)}.")
        opens, closes = (self._tokenizer.id_of(mark) for mark in (OPENS, CLOSES))
        channel = (opens, closes) if grammar.thinks and opens is not None and closes is not None else None
        return CompiledGrammar(matcher, channel)


class CompiledGrammar:
    """A grammar that was compiled for a model. channel: the tokens around thoughts that may come before the answer."""

    def __init__(self, matcher: Any, channel: tuple[int, int] | None) -> None:
        self._matcher = matcher
        self._channel = channel

    def constraint(self) -> Constraint:
        """Return what a new row must follow."""
        following = GrammarConstraint(self._matcher.deep_copy())
        return following if self._channel is None else ThoughtsFirst(following, *self._channel)


class GrammarConstraint:
    """The `Constraint` of one row that follows a grammar. matcher: an LLMatcher of its own, which has read nothing."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def mask(self, logits: Logits) -> Logits:
        """See `Constraint`."""
        mask = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise GrammarError(f"The grammar cannot be followed any further: {_reason(self._matcher)}.")
        return np.where(_allowed(mask, len(logits)), logits, np.float32("-inf"))

    def take(self, token: int) -> None:
        """See `Constraint`."""
        if not self._matcher.consume_token(token):
            raise GrammarError(f"The grammar cannot be followed any further: {_reason(self._matcher)}.")


class ThoughtsFirst:
    """A `Constraint` on what comes after the thoughts. opens, closes: the tokens around them."""

    def __init__(self, answer: Constraint, opens: int, closes: int) -> None:
        self._answer = answer
        self._opens, self._closes = opens, closes
        self._thinking = False
        self._answering = False

    def mask(self, logits: Logits) -> Logits:
        """See `Constraint`."""
        if self._thinking:
            return logits
        masked = self._answer.mask(logits)
        if not self._answering:
            masked[self._opens] = logits[self._opens]
        return masked

    def take(self, token: int) -> None:
        """See `Constraint`."""
        if self._thinking:
            self._thinking = token != self._closes
        elif token == self._opens and not self._answering:
            self._thinking = True
        else:
            self._answering = True
            self._answer.take(token)


class _Vocabulary:
    """The bytes of each token, and a text's tokens: the attributes that llguidance reads."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, ends: list[int]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = ends[0]
        self.bos_token_id = tokenizer.special_id("bos_token")
        added = tokenizer.backend.get_added_tokens_decoder()
        special = {index for index, token in added.items() if token.special}
        # no text of an answer contains those of tool calls, whatever the tokenizer calls them
        marks = {tokenizer.id_of(mark) for form in FORMATS for mark in (form.opens, form.closes, form.quote, form.ends)}
        special |= {mark for mark in marks if mark is not None}
        self.special_token_ids = sorted({*ends, *(index for index in special if index < vocabulary)})
        self.tokens = [self._bytes(tokenizer.token_of(index), index in added) for index in range(vocabulary)]

    @cached_property
    def _characters(self) -> dict[str, int] | None:
        """The byte that each character of a token stands for; None for a vocabulary of texts, as Gemma's."""
        from tokenizers import decoders

        return _byte_characters() if isinstance(self._tokenizer.backend.decoder, decoders.ByteLevel) else None

    def _bytes(self, token: str | None, added: bool) -> bytes:
        if token is None:  # an id that the tokenizer lacks: nothing can follow it
            return b""
        if added:
            return token.encode()
        if self._characters is not None:
            return bytes(self._characters[character] for character in token)
        byte = _BYTE.fullmatch(token)
        return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()

    def __call__(self, text: str | bytes) -> list[int]:
        """Return the tokens of a text."""
        return self._tokenizer.encode(text if isinstance(text, str) else text.decode())


def _byte_characters() -> dict[str, int]:
    """Return the characters by which vocabularies of bytes write them, as in GPT-2: printable ones for themselves."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


def _allowed(mask: bytes, vocabulary: int) -> npt.NDArray[np.bool_]:
    """Return which tokens [V] a mask with a bit for each allows."""
    return np.unpackbits(np.frombuffer(mask, np.uint8), count=vocabulary, bitorder="little").view(np.bool_)


def _reason(matcher: Any) -> str:
    text = " ".join(matcher.get_error().replace("<non-verbose/>", "").split())
    return text[:_SHOWN].rstrip(".")
