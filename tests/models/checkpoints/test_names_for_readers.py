"""The tensor names of artifacts are those that vLLM and SGLang load, written out here as their loaders have them.

Read in vLLM 0.32.0 (`gemma3n.py`, `gemma3n_mm.py`, `gemma4.py`, `gemma4_mm.py`, `gemma4_unified.py`, `gemma3_mm.py`,
`fused_moe/routed_experts.py`) and in SGLang (`gemma4_causal.py`, `gemma4_mm.py`); see docs/other-runtimes.md.
"""

import re

import pytest

from benchmarks.released_configs import artifact_tensors
from gemma_awq_cli.models.gemma.architecture import shape_of
from gemma_awq_cli.models.gemma.families import FAMILIES
from tests.tiny import CONFIGS

PACKED = ("qweight", "qzeros", "scales")

# What the files' names of the language model begin with: vLLM's mappers take these prefixes and no others to it.
PREFIXES = {
    "gemma": "model.",
    "gemma2": "model.",
    "gemma3_text": "model.",
    "gemma3": "language_model.model.",  # its own names; it maps model.language_model. to them
    "vaultgemma": "model.",
    "gemma3n_text": "model.",
    "gemma3n": "model.language_model.",
    "gemma4_text": "model.",
    "gemma4": "model.language_model.",
    "gemma4_unified_text": "model.",
    "gemma4_unified": "model.language_model.",
}

# Tiny model -> its layers by what they load: own keys and values, keys as values, or those of another layer.
OWN, KEYS, SHARED = "own", "keys are values", "shared"
ATTENTION = {
    "gemma": [OWN] * 3,
    "gemma-mqa": [OWN] * 3,
    "gemma2": [OWN] * 3,
    "gemma3_text": [OWN] * 3,
    "gemma3": [OWN] * 3,
    "vaultgemma": [OWN] * 3,
    "gemma3n_text": [OWN] * 4 + [SHARED] * 3,
    "gemma4_text": [OWN] * 4 + [SHARED] * 3,
    "gemma4-dense": [OWN, OWN, KEYS],
    "gemma4-experts": [OWN, OWN, KEYS],
    "gemma4_unified_text": [OWN, OWN, KEYS],
}
LINEARS = {
    OWN: ("q_proj", "k_proj", "v_proj", "o_proj"),  # q, k, v -> qkv_proj
    KEYS: ("q_proj", "k_proj", "o_proj"),  # k fills both shards of qkv_proj; no v_proj is read
    SHARED: ("q_proj", "o_proj"),  # q_proj alone is built; k_proj, v_proj and k_norm would be dropped
}
MLP = ("gate_proj", "up_proj", "down_proj")

# What a layer loads in 16 bits, beside its attention's norms.
TWO_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
VAULT_NORMS = ("input_layernorm.weight", "pre_feedforward_layernorm.weight")
FOUR_NORMS = (*TWO_NORMS, "pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight")
PER_LAYER_INPUT = (
    "per_layer_input_gate.weight",
    "per_layer_projection.weight",
    "post_per_layer_input_norm.weight",
)
ALTUP_LAUREL = (
    "altup.correct_output_scale",
    "altup.correction_coefs.weight",
    "altup.prediction_coefs.weight",
    "altup.modality_router.weight",
    "altup.router_norm.weight",
    "laurel.linear_left.weight",
    "laurel.linear_right.weight",
    "laurel.post_laurel_norm.weight",
)
ROUTER = (
    "router.proj.weight",
    "router.scale",
    "router.per_expert_scale",
    "post_feedforward_layernorm_1.weight",
    "pre_feedforward_layernorm_2.weight",
    "post_feedforward_layernorm_2.weight",
)
KEPT = {
    "gemma": TWO_NORMS,
    "gemma-mqa": TWO_NORMS,
    "gemma2": FOUR_NORMS,
    "gemma3_text": FOUR_NORMS,
    "gemma3": FOUR_NORMS,
    "vaultgemma": VAULT_NORMS,
    "gemma3n_text": (*FOUR_NORMS, *PER_LAYER_INPUT, *ALTUP_LAUREL),
    "gemma4_text": (*FOUR_NORMS, *PER_LAYER_INPUT, "layer_scalar"),
    "gemma4-dense": (*FOUR_NORMS, "layer_scalar"),
    "gemma4-experts": (*FOUR_NORMS, *ROUTER, "layer_scalar"),
    "gemma4_unified_text": (*FOUR_NORMS, "layer_scalar"),
}
HEAD_NORMS = {name for name in CONFIGS if name.startswith(("gemma3", "gemma4"))}  # q_norm, and k_norm beside own keys
PER_LAYER_OUTER = (
    "embed_tokens_per_layer.weight",
    "per_layer_model_projection.weight",
    "per_layer_projection_norm.weight",
)
OUTER = {
    "gemma3n_text": (
        *PER_LAYER_OUTER,
        *(f"altup_{kind}projections.{stream}.weight" for kind in ("", "unembed_") for stream in range(3)),
    ),
    "gemma4_text": PER_LAYER_OUTER,
}
# 2-D, one per expert: their mappings turn `experts.E.gate_proj.` into the first half of `w13_`, `up_proj.` into its
# second, `down_proj.` into `w2_`, and what follows the dot (qweight, qzeros, scales) stays.
EXPERTS = {"gemma4-experts": 6}


def names_that_readers_load(name: str) -> set[str]:
    """The names of a tied model, relative to the prefix."""
    names = {"embed_tokens.weight", "norm.weight", *OUTER.get(name, ())}
    for index, attention in enumerate(ATTENTION[name]):
        linears = [f"self_attn.{linear}" for linear in LINEARS[attention]] + [f"mlp.{linear}" for linear in MLP]
        linears += [f"experts.{expert}.{linear}" for expert in range(EXPERTS.get(name, 0)) for linear in MLP]
        kept = [*KEPT[name]]
        if name in HEAD_NORMS:
            kept += ["self_attn.q_norm.weight", *(["self_attn.k_norm.weight"] if attention != SHARED else [])]
        names |= {f"layers.{index}.{linear}.{kind}" for linear in linears for kind in PACKED}
        names |= {f"layers.{index}.{tensor}" for tensor in kept}
    return names


@pytest.mark.parametrize("name", sorted(ATTENTION))
def test_the_planned_tensors_are_what_readers_load(name: str) -> None:
    config = CONFIGS[name]()
    family = FAMILIES[config.model_type]
    planned = artifact_tensors(shape_of(config.get_text_config(), family), 32)
    assert {tensor.removeprefix("model.") for tensor in planned} == names_that_readers_load(name)


def test_every_tiny_model_is_written_out() -> None:
    """A multimodal model has the language model of one of these."""
    text_types = {FAMILIES[CONFIGS[name]().model_type].text_type for name in ATTENTION}
    assert {FAMILIES[make().model_type].text_type for make in CONFIGS.values()} == text_types


@pytest.mark.parametrize("model_type", FAMILIES)
def test_artifacts_begin_with_the_prefix_that_readers_know(model_type: str) -> None:
    written = FAMILIES[model_type].key_layouts[0]
    assert written.prefix == PREFIXES[model_type]
    # the head of a model that has one of its own: beside the language model, or at the top
    assert written.head in ("lm_head.weight", "language_model.lm_head.weight")


@pytest.mark.parametrize("model_type", ["gemma3", "gemma3n", "gemma4", "gemma4_unified"])
def test_companions_are_what_readers_load_beside_the_language_model(model_type: str) -> None:
    family = FAMILIES[model_type]
    towers = "vision_tower|audio_tower|embed_vision|embed_audio|vision_embedder|multi_modal_projector"
    assert all(re.fullmatch(rf"(model\.)?({towers})\.", companion) for companion in family.companion_prefixes)
