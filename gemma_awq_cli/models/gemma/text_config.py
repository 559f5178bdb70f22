"""transformers' config of a language model, made of checked values alone, and whether it reads a whole config."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.gemma.config_values import HINT
from gemma_awq_cli.system.failures import first_line, library_errors


def transformers_text_config(values: Mapping[str, Any], where: Path) -> Any:
    """The config of `values` (see `config_values.text_values`), what they leave out filled in by transformers.

    Importing transformers takes a second.
    """
    from transformers import Gemma2Config, Gemma3TextConfig, GemmaConfig

    classes = {"gemma": GemmaConfig, "gemma2": Gemma2Config, "gemma3_text": Gemma3TextConfig}
    own = copy.deepcopy({name: value for name, value in values.items() if name != "model_type"})  # it writes into them
    with _refusals(f"transformers refuses the values in {where}"):
        return classes[values["model_type"]](**own)


def require_loadable(config: Mapping[str, Any], where: Path) -> None:
    """An error unless transformers reads a whole config.json, the parts that this tool has no use for among them.

    config: one whose values are sound already; where: the file, for errors.
    """
    from transformers import CONFIG_MAPPING

    with _refusals(f"transformers, which is to read the artifact, refuses {where}"):
        CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(dict(config)))


@contextmanager
def _refusals(what: str) -> Iterator[None]:
    from huggingface_hub.errors import StrictDataclassError

    with library_errors(what, HINT):
        try:
            yield
        except StrictDataclassError as error:  # says in its cause what is wrong
            raise GemmaAwqError(f"{what}: {first_line(error.__cause__ or error)}", HINT) from error
