"""The tokenizer of a model folder: the tokenizers library's own, without the seconds that transformers adds to it.

Imports nothing heavy, and loading gives Python's lock away: both can happen while torch is imported.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.files import read_json
from gemma_awq_cli.models.text.template_files import ChatTemplate, find_template
from gemma_awq_cli.system.failures import first_line, library_errors
from gemma_awq_cli.system.json_input import JSON_BYTES, parse_json
from gemma_awq_cli.system.reading import read_bytes, require_regular

COPY = "Copy the tokenizer files of the original model."
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
_SPECIAL_LENGTH = 256  # characters of such a token; a Gemma's longest has 21
_GROWTH = 64  # characters that a normalizer or decoder may make of one; a Gemma's makes one of one
JSON, SENTENCEPIECE, TOKENIZER_CONFIG, MAP = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
)  # fmt: skip


class Tokenizer:
    """Text to token ids and back, with the special tokens and the chat template of a model folder.

    special: `bos_token` and the like -> the token's text. The same ids and texts as transformers' fast tokenizer gives.
    """

    def __init__(self, backend: Any, special: Mapping[str, str], chat_template: ChatTemplate | None) -> None:
        self.backend = backend
        self.special = dict(special)
        self.chat_template = chat_template
        # what a file may ask for beside a text's own ids, the same each time
        backend.no_truncation()
        backend.no_padding()
        backend.post_processor = None
        if getattr(backend.model, "dropout", None):
            backend.model.dropout = None
        known = {token.content for token in backend.get_added_tokens_decoder().values()}
        if missing := [AddedToken(token, special=True) for token in self.special.values() if token not in known]:
            backend.add_tokens(missing)

    def __len__(self) -> int:
        """The vocabulary with all added tokens."""
        return int(self.backend.get_vocab_size())

    def special_id(self, name: str) -> int | None:
        """The id of `bos_token`, `eos_token`, `unk_token` or `pad_token`; None if the model has none."""
        return self.id_of(self.special[name]) if name in self.special else None

    def id_of(self, token: str) -> int | None:
        """The id of exactly this token, or None."""
        found: int | None = self.backend.token_to_id(token)
        return found

    def token_of(self, index: int) -> str | None:
        """The token of an id, as the vocabulary writes it, or None."""
        found: str | None = self.backend.id_to_token(index)
        return found

    def is_added(self, index: int) -> bool:
        """Whether the token is found in a text as it is, before the text is cut into the vocabulary's pieces."""
        return index in self.backend.get_added_tokens_decoder()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, special tokens that it spells out included, none added."""
        with tokenizer_errors("The tokenizer fails with this text"):
            ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        with tokenizer_errors("The tokenizer cannot write tokens as text"):
            text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text


@contextmanager
def tokenizer_errors(what: str) -> Iterator[None]:
    """Turn what the tokenizers library raises into an error `what`: its reason. Wraps its calls alone.

    For a file or a text that it cannot take it raises Exception itself, and no other type of it; where its Rust code
    panics, a BaseException of a module that cannot be imported.
    """
    try:
        yield
    except BaseException as error:
        panicked = (type(error).__module__, type(error).__name__) == ("pyo3_runtime", "PanicException")
        if type(error) is not Exception and not panicked and not isinstance(error, UnicodeError):
            raise
        raise GemmaAwqError(f"{what}: {first_line(error)}", COPY) from None


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of the folder's tokenizer.json; of its tokenizer.model where there is no other."""
    path = folder / TOKENIZER_CONFIG
    config = read_json(path, COPY) if path.is_file() else {}
    template = find_template(folder, config)
    if (folder / JSON).is_file():
        backend, special = _from_json(folder / JSON), _special_tokens(folder, config)
    elif (folder / SENTENCEPIECE).is_file():
        backend, special = _from_sentencepiece(folder)
    else:
        raise GemmaAwqError(f"{folder} has no tokenizer: neither {JSON} nor {SENTENCEPIECE} is there.", COPY)
    for part in ("normalizer", "decoder"):
        _require_bounded(getattr(backend, part), f"The {part} of {folder}'s tokenizer")
    with tokenizer_errors(f"The tokenizer of {folder} cannot be used"):
        return Tokenizer(backend, special, template)


def _from_json(path: Path) -> Any:
    require_regular(path, COPY)
    if (size := path.stat().st_size) > JSON_BYTES:
        raise GemmaAwqError(f"{path} has {size} bytes; at most {JSON_BYTES} are read.", COPY)
    with tokenizer_errors(f"{path} cannot be read"):
        return Backend.from_file(str(path))


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens' texts; as for transformers, an older special_tokens_map.json goes before a config that does
    not list the tokenizer's added tokens.
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
                f"{file} has a {name} that is no text of at most {_SPECIAL_LENGTH} characters: {str(value)[:80]!r}.",
                COPY,
            )
        special[name] = text
    return special


def _from_sentencepiece(folder: Path) -> tuple[Any, dict[str, str]]:
    path = folder / SENTENCEPIECE
    if missing := [name for name, module in _READERS.items() if not _installed(module)]:
        raise GemmaAwqError(
            f"{folder} has a {SENTENCEPIECE} and no {JSON}; to read it, {' and '.join(missing)} must be installed.",
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
        raise GemmaAwqError(f"{path} is a SentencePiece model without tokens.", COPY)
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
    except ModuleNotFoundError:  # of the package that it is in
        return False


def _require_bounded(part: Any, what: str) -> None:
    """An error if a normalizer or a decoder makes very long texts of short ones, which takes time without bound."""
    if part is None:
        return
    state = parse_json(part.__getstate__().decode(), what, COPY)
    if _growth(state) > _GROWTH:
        raise GemmaAwqError(f"{what} makes more than {_GROWTH} characters of one.", COPY)


def _growth(state: Any) -> int:
    """How many characters its replacements, one after another, may make of one."""
    if isinstance(state, list):
        product = 1
        for one in state:
            product = min(product * _growth(one), _GROWTH + 1)
        return product
    if not isinstance(state, dict):
        return 1
    own = state.get("content") if state.get("type") == "Replace" else state.get("prepend")
    return max(1, len(own) if isinstance(own, str) else 1) * _growth(list(state.values()))
