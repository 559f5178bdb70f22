"""The table of the families is complete: all that is needed to add one is checked here."""

import json
from pathlib import Path

import pytest
import transformers

from gemma_awq_cli.models.gemma.config_values import KINDS
from gemma_awq_cli.models.gemma.families import FAMILIES
from gemma_awq_cli.models.gemma.features import FEATURES, features_of
from gemma_awq_cli.models.gemma.layers import layers_of
from tests.tiny import CONFIGS, GEMMA4_TURNS, SPECIAL

SCHEMA = Path(__file__).parents[3] / "docs/report-schema.json"


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_has_tiny_models_of_every_kind_of_layer(model_type: str) -> None:
    family = FAMILIES[model_type]
    assert model_type in CONFIGS
    tiny = [config for config in (make() for make in CONFIGS.values()) if config.model_type == model_type]
    kinds = {layer.kind for config in tiny for layer in layers_of(config.get_text_config(), family)}
    assert kinds == set(family.layer_kinds)
    for config in tiny:
        assert features_of(config.get_text_config(), family) <= FEATURES.keys()


def test_every_tiny_model_is_of_a_family() -> None:
    assert {make().model_type for make in CONFIGS.values()} == FAMILIES.keys()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_familys_names_are_real(model_type: str) -> None:
    family = FAMILIES[model_type]
    text = FAMILIES[family.text_type]  # a multimodal file without its tower is read as this family
    assert text.text_type == family.text_type
    assert family.text_type in KINDS
    assert KINDS[family.text_type].keys() >= {family.activation_key}
    for name in (family.config_class, family.model_class):
        assert hasattr(transformers, name)
    assert getattr(transformers, family.config_class).model_type == model_type
    assert (family.text_section is not None) == bool(family.companions)
    assert family.end_of_turn in (*SPECIAL, *GEMMA4_TURNS)
    assert "lm_head" in family.not_converted
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    assert model_type in schema["properties"]["source"]["properties"]["model_type"]["enum"]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_scales_go_where_the_layer_has_something(model_type: str) -> None:
    family = FAMILIES[model_type]
    for layer in layers_of(CONFIGS[model_type]().get_text_config(), family):
        assert sorted(name for group in layer.groups for name in group.linears) == sorted(layer.linears)
        norms = {norm.name for norm in layer.norms.values()}
        for group in layer.groups:
            if group.fold == "none":
                assert group.source is None
                continue
            assert group.source in (norms if group.fold == "norm" else layer.linears)
            assert len({layer.linears[name].inputs for name in group.linears}) == 1
        normalized = {group.name for group in layer.groups if group.normalized}
        assert normalized == ({"o", "down"} if "attention_norm" in layer.norms else set())
