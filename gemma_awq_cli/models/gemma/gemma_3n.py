"""The families of Gemma 3n: `gemma3n` (E2B, E4B) and its language model alone.

Families are written out in full and never inherit from each other.
"""

from gemma_awq_cli.models.gemma.family import FULL, SLIDING, TEXT_READ, Companion, Family, KeyLayout, ScaleGroup

_ATTENTION_INPUT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_MLP_INPUT = ("mlp.gate_proj", "mlp.up_proj")
_MODELING = "gemma3n.modeling_gemma3n.Gemma3n"
_NOT_CONVERTED = (
    "lm_head",
    "vision_tower", "model.vision_tower", "audio_tower", "model.audio_tower", "embed_vision", "model.embed_vision",
    "embed_audio", "model.embed_audio",
    "per_layer_input_gate", "per_layer_projection", "per_layer_model_projection",
    "altup", "laurel", ".*altup", ".*laurel", ".*altup_projections", ".*altup_unembed_projections",
)  # fmt: skip

GEMMA3N_TEXT = Family(
    model_type="gemma3n_text",
    title="Gemma 3n (text)",
    licence="gemma",
    end_of_turn="<end_of_turn>",
    text_type="gemma3n_text",
    text_section=None,
    config_class="Gemma3nTextConfig",
    model_class="Gemma3nForCausalLM",
    activation_key="hidden_activation",
    layer_kinds=(SLIDING, FULL),
    rope_per_kind=True,
    heads_per_kind=False,
    gain_offset=0.0,
    attention_softcap=False,
    query_scale=None,
    value_norm=True,
    layer_scalar=False,
    altup=True,
    norms={
        "input_norm": "input_layernorm",
        "attention_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "post_mlp_norm": "post_feedforward_layernorm",
        "q_norm": "self_attn.q_norm",
        "k_norm": "self_attn.k_norm",
        "per_layer_norm": "post_per_layer_input_norm",
        "laurel_norm": "laurel.post_laurel_norm",
        "router_norm": "altup.router_norm",
    },
    groups=(
        # Laurel adds the normed input itself to its output, so the norm cannot take up a scale.
        ScaleGroup("qkv", _ATTENTION_INPUT, None, "none"),
        # A norm follows v_proj, so no scale of its rows would reach o_proj.
        ScaleGroup("o", ("self_attn.o_proj",), None, "none", normalized=True),
        ScaleGroup("gate_up", _MLP_INPUT, "pre_feedforward_layernorm", "norm"),
        ScaleGroup("down", ("mlp.down_proj",), "mlp.up_proj", "rows", normalized=True),
    ),
    key_layouts=(KeyLayout("model.", "lm_head.weight"),),
    read_layouts=TEXT_READ,
    companions=(),
    not_converted=_NOT_CONVERTED,
    float16=False,
)

GEMMA3N = Family(
    model_type="gemma3n",
    title="Gemma 3n (multimodal: the language model is quantized, the towers are copied)",
    licence="gemma",
    end_of_turn="<end_of_turn>",
    text_type="gemma3n_text",
    text_section="text_config",
    config_class="Gemma3nConfig",
    model_class="Gemma3nForConditionalGeneration",
    activation_key="hidden_activation",
    layer_kinds=(SLIDING, FULL),
    rope_per_kind=True,
    heads_per_kind=False,
    gain_offset=0.0,
    attention_softcap=False,
    query_scale=None,
    value_norm=True,
    layer_scalar=False,
    altup=True,
    norms={
        "input_norm": "input_layernorm",
        "attention_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "post_mlp_norm": "post_feedforward_layernorm",
        "q_norm": "self_attn.q_norm",
        "k_norm": "self_attn.k_norm",
        "per_layer_norm": "post_per_layer_input_norm",
        "laurel_norm": "laurel.post_laurel_norm",
        "router_norm": "altup.router_norm",
    },
    groups=(
        # Laurel adds the normed input itself to its output, so the norm cannot take up a scale.
        ScaleGroup("qkv", _ATTENTION_INPUT, None, "none"),
        # A norm follows v_proj, so no scale of its rows would reach o_proj.
        ScaleGroup("o", ("self_attn.o_proj",), None, "none", normalized=True),
        ScaleGroup("gate_up", _MLP_INPUT, "pre_feedforward_layernorm", "norm"),
        ScaleGroup("down", ("mlp.down_proj",), "mlp.up_proj", "rows", normalized=True),
    ),
    key_layouts=(KeyLayout("model.language_model.", "lm_head.weight"),),
    read_layouts=(
        KeyLayout("language_model.model.", "language_model.lm_head.weight"),
        KeyLayout("language_model.", "lm_head.weight"),
    ),
    companions=(
        Companion("vision_tower", "vision_config", None, library="timm"),
        Companion("audio_tower", "audio_config", f"{_MODELING}AudioEncoder"),
        Companion("embed_vision", "vision_config", f"{_MODELING}MultimodalEmbedder", "section and text"),
        Companion("embed_audio", "audio_config", f"{_MODELING}MultimodalEmbedder", "section and text"),
    ),
    not_converted=_NOT_CONVERTED,
    float16=False,
)
