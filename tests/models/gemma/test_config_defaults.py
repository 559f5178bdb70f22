"""The sizes that a config leaves out are transformers' defaults."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers

from gemma_awq_cli.models.gemma.architecture import shape_of
from gemma_awq_cli.models.gemma.config_defaults import with_defaults
from gemma_awq_cli.models.gemma.config_values import KINDS, require_sound, text_values
from gemma_awq_cli.models.gemma.families import FAMILIES
from gemma_awq_cli.models.gemma.layers import layers_of
from tests.tiny import CONFIGS

WHERE = Path("config.json")
GIVEN: dict[str, dict[str, Any]] = {
    "nothing": {},
    "layers": {"num_hidden_layers": 20},
    "sizes": {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64},
}
OWN: dict[str, list[dict[str, Any]]] = {
    "gemma3_text": [{"sliding_window_pattern": 3}],
    "gemma4_text": [
        {"attention_k_eq_v": True, "num_global_key_value_heads": 2, "hidden_size_per_layer_input": 0},
        {"num_kv_shared_layers": 10, "use_double_wide_mlp": True, "global_head_dim": 128},
        {"num_hidden_layers": 10},  # whose last layer would be a sliding one
    ],
}
CASES = [(name, given) for name in KINDS for given in [*GIVEN.values(), *OWN.get(name, [])]]


@pytest.mark.parametrize(("model_type", "given"), CASES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(CASES)])
def test_sizes_are_those_of_transformers(model_type: str, given: dict[str, Any]) -> None:
    family = FAMILIES[model_type]
    theirs = getattr(transformers, family.config_class)(**given)
    values = text_values(given, family, WHERE, theirs.num_hidden_layers)
    ours = with_defaults(values, 0)
    require_sound(ours, family, WHERE)
    plain = [[replace(layout, rope={}) for layout in layers_of(config, family)] for config in (ours, theirs)]
    assert plain[0] == plain[1]
    mine, other = shape_of(ours, family), shape_of(theirs, family)
    assert (mine.hidden, mine.vocabulary, mine.per_layer, mine.altup, mine.outer()) == (
        other.hidden, other.vocabulary, other.per_layer, other.altup, other.outer()
    )  # fmt: skip
    assert ours.max_position_embeddings == theirs.max_position_embeddings


@pytest.mark.parametrize("kind", CONFIGS)
def test_values_that_are_given_stay(kind: str) -> None:
    config = CONFIGS[kind]()
    family = FAMILIES[config.model_type]
    text = config.get_text_config()
    ours = with_defaults(text_values(config.to_dict(), family, WHERE, text.num_hidden_layers), 0)
    plain = [[replace(layout, rope={}) for layout in layers_of(one, family)] for one in (ours, text)]
    assert plain[0] == plain[1]
