"""The tokenizer of a model folder, read by the tokenizers library itself; transformers would add seconds.

Imports nothing heavy. For one short text, the library gets a part of the vocabulary only: see `token_table.py`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import DecodeStream

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.files import read_json
from gemma_awq_cli.models.text.template_files import ChatTemplate, find_template
from gemma_awq_cli.models.text.token_table import TableStream, TokenTable, read_token_table
from gemma_awq_cli.system.failures import first_line, library_errors
from gemma_awq_cli.system.json_input import JSON_BYTES, parse_json
from gemma_awq_cli.system.reading import read_bytes, require_regular

COPY = "Copy the tokenizer files of the original model."
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
_SPECIAL_LENGTH = 256  # characters of a special token; a Gemma's longest has 21
_GROWTH = 64  # characters that a normalizer or decoder may make of one; a Gemma's makes one
JSON, SENTENCEPIECE, TOKENIZER_CONFIG, MAP = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
)  # fmt: skip


class Tokenizer:
    """Text to token ids and back, with the special tokens and the chat template of a model folder.

    special: `bos_token` and the like -> the token's text. Gives the same ids and texts as transformers' fast tokenizer.

    load: reads the library's tokenizer; table: what is used instead of it until something needs the whole.
    """

    def __init__(
        self,
        load: Callable[[], Any],
        special: Mapping[str, str],
        chat_template: ChatTemplate | None,
        table: TokenTable | None = None,
    ) -> None:
        self._load = load
        self._table = table
        self.special = dict(special)
        self.chat_template = chat_template

    @cached_property
    def backend(self) -> Any:
        """The library's tokenizer."""
        backend = self._load()
        self._table = None
        # a text's ids are its own alone and the same each time, whatever else the file asks for
        backend.no_truncation()
        backend.no_padding()
        backend.post_processor = None
        if getattr(backend.model, "dropout", None):
            backend.model.dropout = None
        # It keeps the last 10000 texts that it has cut into tokens. A Gemma's are cut as a whole: kilobytes of each
        # prompt, of use only for the same one again.
        if hasattr(backend.model, "_resize_cache"):
            backend.model._resize_cache(0)
        known = {token.content for token in backend.get_added_tokens_decoder().values()}
        if missing := [AddedToken(token, special=True) for token in self.special.values() if token not in known]:
            backend.add_tokens(missing)
        return backend

    def __len__(self) -> int:
        """Return the number of tokens, added tokens included."""
        return int(self.backend.get_vocab_size()) if self._table is None else len(self._table.ids)

    def special_id(self, name: str) -> int | None:
        """Return the id of `bos_token`, `eos_token`, `unk_token` or `pad_token`; None if the model has none."""
        return self.id_of(self.special[name]) if name in self.special else None

    def id_of(self, token: str) -> int | None:
        """Return the id of exactly this token, or None."""
        found: int | None = self.backend.token_to_id(token) if self._table is None else self._table.ids.get(token)
        return found

    def token_of(self, index: int) -> str | None:
        """Return the token of an id, as the vocabulary writes it, or None."""
        found: str | None = self.backend.id_to_token(index) if self._table is None else self._table.tokens.get(index)
        return found

    def text_of(self, index: int) -> str:
        """Return the text of one token; for a part of a character, which has none, the vocabulary's name for it."""
        text = self.decode([index])
        return (self.token_of(index) or text) if "\ufffd" in text else text

    def is_added(self, index: int) -> bool:
        """Return whether it is an added token, which is found in a text before the text is cut into pieces."""
        return index in (self.backend.get_added_tokens_decoder() if self._table is None else self._table.added_ids)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, with the special tokens that it spells out and no others."""
        with tokenizer_errors("The tokenizer fails with this text"):
            if self._table is not None and (known := self._table.encode(text)) is not None:
                return known
            ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Return the text of token ids."""
        with tokenizer_errors("The tokenizer cannot decode tokens"):
            if self._table is not None:
                return self._table.decode(ids, skip_special_tokens)
            text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def decode_stream(self) -> Callable[[int], str | None]:
        """Return what takes the tokens of one row and returns the text that each of them makes certain, or None.

        Special tokens are left out. Raises GemmaAwqError for tokens that cannot be decoded.
        """
        if self._table is not None:
            step = TableStream(self._table).step
        else:
            step = partial(DecodeStream(skip_special_tokens=True).step, self.backend)

        def add(token: int) -> str | None:
            with tokenizer_errors("The tokenizer cannot decode tokens one by one"):
                return step(token)

        return add


@contextmanager
def tokenizer_errors(what: str) -> Iterator[None]:
    """Turn what the tokenizers library raises into GemmaAwqError("`what`: reason"). The body should call nothing else.

    For a file or a text that it cannot take, the library raises plain Exception; if its Rust code panics, a
    BaseException of a module that cannot be imported.
    """
    try:
        yield
    except BaseException as error:
        panicked = (type(error).__module__, type(error).__name__) == ("pyo3_runtime", "PanicException")
        if type(error) is not Exception and not panicked and not isinstance(error, UnicodeError):
            raise
        raise GemmaAwqError(f"{what}: {first_line(error)}", COPY) from None


def load_tokenizer(folder: Path, one_text: bool = False) -> Tokenizer:
    """Return the tokenizer of the folder's tokenizer.json or, if there is none, of its tokenizer.model.

    one_text: read as little of it as one text needs, if the file allows it. Raises GemmaAwqError if neither is there or
    one cannot be used.
    """
    path = folder / TOKENIZER_CONFIG
    config = read_json(path, COPY) if path.is_file() else {}
    template = find_template(folder, config)
    if (folder / JSON).is_file():
        special = _special_tokens(folder, config)
        table = _table_of(folder, special) if one_text else None
        if table is not None:
            return Tokenizer(lambda: _whole(folder, _from_json(folder / JSON)), special, template, table)
        backend = _from_json(folder / JSON)
    elif (folder / SENTENCEPIECE).is_file():
        backend, special = _from_sentencepiece(folder)
    else:
        raise GemmaAwqError(f"{folder} has no tokenizer: neither {JSON} nor {SENTENCEPIECE}.", COPY)
    whole = _whole(folder, backend)
    tokenizer = Tokenizer(lambda: whole, special, template)
    with tokenizer_errors(f"The tokenizer of {folder} cannot be used"):
        assert tokenizer.backend is whole  # it is prepared now
    return tokenizer


def _whole(folder: Path, backend: Any) -> Any:
    for part in ("normalizer", "decoder"):
        _require_bounded(getattr(backend, part), f"The {part} of {folder}'s tokenizer")
    return backend


def _table_of(folder: Path, special: Mapping[str, str]) -> TokenTable | None:
    """The table of a folder's tokenizer.json, if the library would add no token to it."""
    _require_size(folder / JSON)
    table = read_token_table(folder / JSON)
    if table is None or not table.has_added(special.values()):
        return None
    _require_growth(table.decoder, f"The decoder of {folder}'s tokenizer")
    return table


def _from_json(path: Path) -> Any:
    _require_size(path)
    with tokenizer_errors(f"{path} cannot be read"):
        return Backend.from_file(str(path))


def _require_size(path: Path) -> None:
    require_regular(path, COPY)
    if (size := path.stat().st_size) > JSON_BYTES:
        raise GemmaAwqError(f"{path} has {size} bytes; the limit is {JSON_BYTES}.", COPY)


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Return the texts of the special tokens by their names.

    As in transformers, an older special_tokens_map.json takes precedence over a config that does not list the
    tokenizer's added tokens.
    """
    declared = {name: (config[name], folder / TOKENIZER_CONFIG) for name in _SPECIAL if name in config}
    path = folder / MAP
    if "added_tokens_decoder" not in config and path.is_file():
        older = read_json(path, COPY)
        declared |= {name: (older[name], path) for name in _SPECIAL if name in older}
    special = {}
    for name, (value, file) in declared.items():
        text = value.get("content") if isinstance(value, dict) else value
        if value is None:
            continue
        if not isinstance(text, str) or not 0 < len(text) <= _SPECIAL_LENGTH:
            raise GemmaAwqError(
                f"Invalid {name} in {file}: {str(value)[:80]!r} is not a text of 1 to {_SPECIAL_LENGTH} characters.",
                COPY,
            )
        special[name] = text
    return special


def _from_sentencepiece(folder: Path) -> tuple[Any, dict[str, str]]:
    path = folder / SENTENCEPIECE
    if missing := [name for name, module in _READERS.items() if not _installed(module)]:
        raise GemmaAwqError(
            f"{folder} has a {SENTENCEPIECE} and no {JSON}. To read it, {' and '.join(missing)} must be installed.",
            f"Install: pip install {' '.join(missing)}. Or copy the original model's {JSON} into the folder.",
        )
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    parsed = sentencepiece_model_pb2.ModelProto()
    try:
        parsed.ParseFromString(read_bytes(path, COPY, JSON_BYTES))
    except DecodeError as error:
        raise GemmaAwqError(f"{path} is not a SentencePiece model: {first_line(error)}.", COPY) from None
    if not parsed.pieces:
        raise GemmaAwqError(f"{path} is a SentencePiece model without any tokens.", COPY)
    from transformers import AutoTokenizer

    what = f"The tokenizer of {folder} cannot be loaded"
    with library_errors(what, COPY), tokenizer_errors(what):
        made: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        special = {name: str(token) for name, token in made.special_tokens_map.items() if name in _SPECIAL}
        return made.backend_tokenizer, special


_READERS = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package that the module is in
        return False


def _require_bounded(part: Any, what: str) -> None:
    """Raise GemmaAwqError if a normalizer or decoder turns short texts into very long ones, in unbounded time."""
    if part is None:
        return
    _require_growth(parse_json(part.__getstate__().decode(), what, COPY), what)


def _require_growth(state: Any, what: str) -> None:
    if _growth(state) > _GROWTH:
        raise GemmaAwqError(f"{what} turns one character into more than {_GROWTH}.", COPY)


def _growth(state: Any) -> int:
    """Return how many characters its replacements, one after another, may make of one."""
    if isinstance(state, list):
        product = 1
        for one in state:
            product = min(product * _growth(one), _GROWTH + 1)
        return product
    if not isinstance(state, dict):
        return 1
    own = state.get("content") if state.get("type") == "Replace" else state.get("prepend")
    return max(1, len(own) if isinstance(own, str) else 1) * _growth(list(state.values()))
