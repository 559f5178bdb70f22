"""transformers' config of a language model, built from checked values alone, and its check of a whole config.json."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.gemma.config_values import HINT
from gemma_awq_cli.models.gemma.families import FAMILIES
from gemma_awq_cli.system.failures import first_line, library_errors


def transformers_text_config(values: Mapping[str, Any], where: Path) -> Any:
    """The config of `values` (see `config_values.text_values`), with transformers' defaults for those left out.

    Importing transformers takes a second.
    """
    import transformers

    config_class = getattr(transformers, FAMILIES[values["model_type"]].config_class)
    own = copy.deepcopy({name: value for name, value in values.items() if name != "model_type"})  # it writes into them
    with _refusals(f"transformers does not accept the values in {where}"):
        return config_class(**own)


def require_loadable(config: Mapping[str, Any], where: Path) -> Any:
    """Return transformers' config of a whole config.json; an error unless it can read it all, whatever is used here.

    config: one whose language model's values are checked already; where: the file, for errors.
    """
    from transformers import CONFIG_MAPPING

    with _refusals(f"transformers, which has to read the artifact, does not accept {where}"):
        return CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(dict(config)))


@contextmanager
def _refusals(what: str) -> Iterator[None]:
    from huggingface_hub.errors import StrictDataclassError

    with library_errors(what, HINT):
        try:
            yield
        except StrictDataclassError as error:  # its cause says what is wrong
            raise GemmaAwqError(f"{what}: {first_line(error.__cause__ or error)}", HINT) from error
