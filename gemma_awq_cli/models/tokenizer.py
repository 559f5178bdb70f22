"""The tokenizer of a model folder, without the seconds that transformers spends on taking a 33 MB file apart twice."""

from pathlib import Path
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoint import read_json

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def load_tokenizer(folder: Path) -> Any:
    """transformers' fast tokenizer of the folder's tokenizer.json; AutoTokenizer's where there is none."""
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


def _from_json(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    special = {}
    for name in _SPECIAL:
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            special[name] = token
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **special)
    template = folder / "chat_template.jinja"
    tokenizer.chat_template = (
        template.read_text(encoding="utf-8") if template.is_file() else config.get("chat_template")
    )
    return tokenizer


def _from_auto(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)
