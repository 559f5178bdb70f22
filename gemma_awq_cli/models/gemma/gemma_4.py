"""The families of Gemma 4, and their language models alone: `gemma4` (E2B, E4B, 26B-A4B, 31B), `gemma4_unified` (12B).

Families are written out in full and never inherit from each other. What only some sizes have (per-layer embeddings,
shared keys and values, experts) follows from the config: see layers.py.
"""

from gemma_awq_cli.models.gemma.family import FULL, SLIDING, TEXT_READ, Companion, Family, KeyLayout, ScaleGroup

_ATTENTION_INPUT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_MLP_INPUT = ("mlp.gate_proj", "mlp.up_proj")
_MODELING = "gemma4.modeling_gemma4.Gemma4"
_UNIFIED = "gemma4_unified.modeling_gemma4_unified.Gemma4Unified"
_NOT_CONVERTED = (
    "lm_head",
    "vision_tower", "model.vision_tower", "audio_tower", "model.audio_tower", "embed_vision", "model.embed_vision",
    "embed_audio", "model.embed_audio", "vision_embedder", "model.vision_embedder",
    "per_layer_input_gate", "per_layer_projection", "per_layer_model_projection", "router.proj",
)  # fmt: skip

GEMMA4_TEXT = Family(
    model_type="gemma4_text",
    title="Gemma 4 (text)",
    licence="apache-2.0",
    end_of_turn="<turn|>",
    text_type="gemma4_text",
    text_section=None,
    config_class="Gemma4TextConfig",
    model_class="Gemma4ForCausalLM",
    activation_key="hidden_activation",
    layer_kinds=(SLIDING, FULL),
    rope_per_kind=True,
    heads_per_kind=True,
    gain_offset=0.0,
    attention_softcap=False,
    query_scale=None,
    value_norm=True,
    layer_scalar=True,
    altup=False,
    norms={
        "input_norm": "input_layernorm",
        "attention_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "post_mlp_norm": "post_feedforward_layernorm",
        "q_norm": "self_attn.q_norm",
        "k_norm": "self_attn.k_norm",
        "per_layer_norm": "post_per_layer_input_norm",
        "dense_norm": "post_feedforward_layernorm_1",
        "experts_norm": "pre_feedforward_layernorm_2",
        "post_experts_norm": "post_feedforward_layernorm_2",
    },
    groups=(
        ScaleGroup("qkv", _ATTENTION_INPUT, "input_layernorm", "norm"),
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

GEMMA4 = Family(
    model_type="gemma4",
    title="Gemma 4 (multimodal: the language model is quantized, the towers are copied)",
    licence="apache-2.0",
    end_of_turn="<turn|>",
    text_type="gemma4_text",
    text_section="text_config",
    config_class="Gemma4Config",
    model_class="Gemma4ForConditionalGeneration",
    activation_key="hidden_activation",
    layer_kinds=(SLIDING, FULL),
    rope_per_kind=True,
    heads_per_kind=True,
    gain_offset=0.0,
    attention_softcap=False,
    query_scale=None,
    value_norm=True,
    layer_scalar=True,
    altup=False,
    norms={
        "input_norm": "input_layernorm",
        "attention_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "post_mlp_norm": "post_feedforward_layernorm",
        "q_norm": "self_attn.q_norm",
        "k_norm": "self_attn.k_norm",
        "per_layer_norm": "post_per_layer_input_norm",
        "dense_norm": "post_feedforward_layernorm_1",
        "experts_norm": "pre_feedforward_layernorm_2",
        "post_experts_norm": "post_feedforward_layernorm_2",
    },
    groups=(
        ScaleGroup("qkv", _ATTENTION_INPUT, "input_layernorm", "norm"),
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
        Companion("vision_tower", "vision_config", f"{_MODELING}VisionModel"),
        Companion("audio_tower", "audio_config", f"{_MODELING}AudioModel"),
        Companion("embed_vision", "vision_config", f"{_MODELING}MultimodalEmbedder", "section and text"),
        Companion("embed_audio", "audio_config", f"{_MODELING}MultimodalEmbedder", "section and text"),
    ),
    not_converted=_NOT_CONVERTED,
    float16=False,
)

GEMMA4_UNIFIED_TEXT = Family(
    model_type="gemma4_unified_text",
    title="Gemma 4 12B (text)",
    licence="apache-2.0",
    end_of_turn="<turn|>",
    text_type="gemma4_unified_text",
    text_section=None,
    config_class="Gemma4UnifiedTextConfig",
    model_class="Gemma4UnifiedForCausalLM",
    activation_key="hidden_activation",
    layer_kinds=(SLIDING, FULL),
    rope_per_kind=True,
    heads_per_kind=True,
    gain_offset=0.0,
    attention_softcap=False,
    query_scale=None,
    value_norm=True,
    layer_scalar=True,
    altup=False,
    norms={
        "input_norm": "input_layernorm",
        "attention_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "post_mlp_norm": "post_feedforward_layernorm",
        "q_norm": "self_attn.q_norm",
        "k_norm": "self_attn.k_norm",
    },
    groups=(
        ScaleGroup("qkv", _ATTENTION_INPUT, "input_layernorm", "norm"),
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

GEMMA4_UNIFIED = Family(
    model_type="gemma4_unified",
    title="Gemma 4 12B (multimodal: the language model is quantized, the embedders are copied)",
    licence="apache-2.0",
    end_of_turn="<turn|>",
    text_type="gemma4_unified_text",
    text_section="text_config",
    config_class="Gemma4UnifiedConfig",
    model_class="Gemma4UnifiedForConditionalGeneration",
    activation_key="hidden_activation",
    layer_kinds=(SLIDING, FULL),
    rope_per_kind=True,
    heads_per_kind=True,
    gain_offset=0.0,
    attention_softcap=False,
    query_scale=None,
    value_norm=True,
    layer_scalar=True,
    altup=False,
    norms={
        "input_norm": "input_layernorm",
        "attention_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "post_mlp_norm": "post_feedforward_layernorm",
        "q_norm": "self_attn.q_norm",
        "k_norm": "self_attn.k_norm",
    },
    groups=(
        ScaleGroup("qkv", _ATTENTION_INPUT, "input_layernorm", "norm"),
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
        # transformers holds the first two as one module, whose tensors have other names in memory than in the files.
        Companion(
            "vision_embedder",
            "vision_config",
            f"{_UNIFIED}VisionEmbedder",
            "section and text",
            unused=("multimodal_embedder",),
        ),
        Companion("embed_vision", "vision_config", f"{_UNIFIED}MultimodalEmbedder", "section and text"),
        Companion("embed_audio", "audio_config", f"{_UNIFIED}MultimodalEmbedder", "section and text"),
    ),
    not_converted=_NOT_CONVERTED,
    float16=False,
)
