"""`modules_to_not_convert` keeps exactly the linears that stay 16-bit, by each rule that readers match it with."""

from collections.abc import Callable, Iterable

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.gemma3n import modeling_gemma3n as gemma3n
from transformers.quantizers.quantizers_utils import should_convert_module

from gemma_awq_cli.models.gemma.families import FAMILIES
from gemma_awq_cli.models.gemma.layers import layers_of
from tests.tiny import CONFIGS


def converts_in_transformers(name: str, kept: Iterable[str]) -> bool:
    """Whether transformers replaces this linear: from the start of the name to a dot, by regex, or as its end."""
    return should_convert_module(name, list(kept))


def converts_by_substring(name: str, kept: Iterable[str]) -> bool:
    """The rule of vLLM (`is_layer_skipped(..., skip_with_substr=True)`) and SGLang."""
    return not any(entry in name for entry in kept)


RULES = {"transformers": converts_in_transformers, "substring": converts_by_substring}


# Multimodal models around the tiny text models, with towers of one layer; CONFIGS has Gemma 3's.
ONE_LAYER = {"num_hidden_layers": 1}
MULTIMODAL = {
    "gemma4": lambda: transformers.Gemma4Config(
        text_config=CONFIGS["gemma4_text"]().to_dict(), vision_config=ONE_LAYER, audio_config=ONE_LAYER
    ),
    "gemma4 experts": lambda: transformers.Gemma4Config(
        text_config=CONFIGS["gemma4-experts"]().to_dict(), vision_config=ONE_LAYER
    ),
    "gemma4_unified": lambda: transformers.Gemma4UnifiedConfig(
        text_config=CONFIGS["gemma4_unified_text"]().to_dict(), vision_config={"mm_embed_dim": 64}, audio_config={}
    ),
    "gemma3n": lambda: transformers.Gemma3nConfig(
        text_config=CONFIGS["gemma3n_text"]().to_dict(), audio_config={"conf_num_hidden_layers": 1}
    ),
}
MODELS = {**MULTIMODAL, **CONFIGS}


def tiny_model(name: str, monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    """A tiny model with its towers and its head, without memory for its weights."""
    config = MODELS[name]()
    if config.model_type == "gemma3n":  # its vision tower is timm's, which is not installed for this
        build = gemma3n.AutoModel.from_config

        def stub(part: PreTrainedConfig, **options: object) -> nn.Module:
            return nn.Sequential(nn.Linear(8, 8)) if part.model_type == "gemma3n_vision" else build(part)

        monkeypatch.setattr(gemma3n.AutoModel, "from_config", stub)
    with torch.device("meta"):
        return getattr(transformers, FAMILIES[config.model_type].model_class)(config)


def quantized_names(model: PreTrainedModel) -> set[str]:
    """The full names of the linears that become 4-bit."""
    family = FAMILIES[model.config.model_type]
    layers = "model.layers" if family.text_section is None else "model.language_model.layers"
    assert isinstance(model.get_submodule(layers), nn.ModuleList)
    layouts = layers_of(model.config.get_text_config(), family)
    return {f"{layers}.{index}.{linear}" for index, layout in enumerate(layouts) for linear in layout.packed()}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("name", MODELS)
def test_readers_convert_exactly_the_quantized_linears(
    name: str, rule: Callable[[str, Iterable[str]], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(name, monkeypatch)
    kept = FAMILIES[model.config.model_type].not_converted
    quantized = quantized_names(model)
    linears = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert len(linears - quantized) > 0  # the head at least
    # Names that are not linears in transformers (experts in one tensor) are linears in other readers.
    converted = {path for path in linears | quantized if rule(path, kept)}
    assert converted == quantized


def test_every_family_is_covered() -> None:
    assert {make().model_type for make in MODELS.values()} == FAMILIES.keys()


def test_a_bare_name_of_a_tower_does_not_reach_it_in_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why the towers are listed twice: a list that vLLM reads rightly made transformers swap the tower's linears."""
    tower = "model.vision_tower.encoder.layers.0.self_attn.q_proj"
    bare = ("lm_head", "vision_tower", "multi_modal_projector")
    assert tower in dict(tiny_model("gemma3", monkeypatch).named_modules())
    assert converts_in_transformers(tower, bare)
    assert not converts_by_substring(tower, bare)
