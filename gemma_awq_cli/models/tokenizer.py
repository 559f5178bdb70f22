"""The tokenizer of a model folder: the tokenizers library's own, without the seconds that transformers adds to it.

Imports nothing heavy, and loading gives Python's lock away: both can happen while torch is imported.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.files import read_json

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """Text to token ids and back, with the special tokens and the chat template of a model folder.

    special: `bos_token` and the like -> the token's text. The same ids and texts as transformers' fast tokenizer gives.
    """

    def __init__(self, backend: Any, special: Mapping[str, str], chat_template: str | None) -> None:
        self.backend = backend
        self.special = dict(special)
        self.chat_template = chat_template
        backend.no_truncation()
        backend.no_padding()
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

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, special tokens that it spells out included, none added."""
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of the folder's tokenizer.json; what AutoTokenizer makes of other files where there is none."""
    try:
        return _from_json(folder) if (folder / "tokenizer.json").is_file() else _from_auto(folder)
    except Exception as error:
        # for a damaged file the tokenizers library raises Exception itself, and no other type of it
        if type(error) is not Exception and not isinstance(error, (OSError, ValueError, TypeError, KeyError)):
            raise
        raise GemmaAwqError(
            f"The tokenizer of {folder} cannot be loaded: {error}",
            "Copy the tokenizer files of the original model.",
        ) from None


def _from_json(folder: Path) -> Tokenizer:
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    special = {}
    for name in _SPECIAL:
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            special[name] = token
    file = folder / "chat_template.jinja"
    template = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
    return Tokenizer(Backend.from_file(str(folder / "tokenizer.json")), special, _one_template(template))


def _from_auto(folder: Path) -> Tokenizer:
    from transformers import AutoTokenizer

    made: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    special = {name: token for name, token in made.special_tokens_map.items() if name in _SPECIAL}
    return Tokenizer(made.backend_tokenizer, special, _one_template(made.chat_template))


def _one_template(template: Any) -> str | None:
    """Of several named templates the one called default."""
    if isinstance(template, list):
        template = {one["name"]: one["template"] for one in template}
    return template["default"] if isinstance(template, dict) else template
