"""transformers' config of a language model, made of checked values alone."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_awq_cli.models.config_values import HINT
from gemma_awq_cli.reading import library_errors


def transformers_text_config(values: Mapping[str, Any], where: Path) -> Any:
    """The config of `values` (see `config_values.text_values`), what they leave out filled in by transformers.

    Importing transformers takes a second.
    """
    from transformers import Gemma2Config, Gemma3TextConfig, GemmaConfig

    classes = {"gemma": GemmaConfig, "gemma2": Gemma2Config, "gemma3_text": Gemma3TextConfig}
    own = copy.deepcopy({name: value for name, value in values.items() if name != "model_type"})  # it writes into them
    with library_errors(f"transformers refuses the values in {where}", HINT):
        return classes[values["model_type"]](**own)
