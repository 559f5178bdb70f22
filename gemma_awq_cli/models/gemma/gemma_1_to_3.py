"""The families of Gemma 1, 2 and 3, and VaultGemma.

Families are written out in full and never inherit from each other: Gemma 3 taking over Gemma 2's table has shipped as
a bug elsewhere.
"""

from gemma_awq_cli.models.gemma.family import FULL, SLIDING, TEXT_READ, Companion, Family, KeyLayout, ScaleGroup

_ATTENTION_INPUT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_MLP_INPUT = ("mlp.gate_proj", "mlp.up_proj")

GEMMA = Family(
    model_type="gemma",
    title="Gemma 1, 1.1, CodeGemma",
    licence="gemma",
    end_of_turn="<end_of_turn>",
    text_type="gemma",
    text_section=None,
    config_class="GemmaConfig",
    model_class="GemmaForCausalLM",
    activation_key="hidden_act",
    layer_kinds=(FULL,),
    rope_per_kind=False,
    heads_per_kind=False,
    gain_offset=1.0,
    attention_softcap=False,
    query_scale="head_dim",
    value_norm=False,
    layer_scalar=False,
    altup=False,
    norms={"input_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    groups=(
        ScaleGroup("qkv", _ATTENTION_INPUT, "input_layernorm", "norm"),
        ScaleGroup("o", ("self_attn.o_proj",), "self_attn.v_proj", "heads"),
        # Gemma 1 has two norms a layer: this one feeds the MLP.
        ScaleGroup("gate_up", _MLP_INPUT, "post_attention_layernorm", "norm"),
        ScaleGroup("down", ("mlp.down_proj",), "mlp.up_proj", "rows"),
    ),
    key_layouts=(KeyLayout("model.", "lm_head.weight"),),
    read_layouts=TEXT_READ,
    companions=(),
    not_converted=("lm_head",),
    float16=True,
)

GEMMA2 = Family(
    model_type="gemma2",
    title="Gemma 2",
    licence="gemma",
    end_of_turn="<end_of_turn>",
    text_type="gemma2",
    text_section=None,
    config_class="Gemma2Config",
    model_class="Gemma2ForCausalLM",
    activation_key="hidden_activation",
    layer_kinds=(SLIDING, FULL),
    rope_per_kind=False,
    heads_per_kind=False,
    gain_offset=1.0,
    attention_softcap=True,
    query_scale="query_pre_attn_scalar",
    value_norm=False,
    layer_scalar=False,
    altup=False,
    norms={
        "input_norm": "input_layernorm",
        "attention_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "post_mlp_norm": "post_feedforward_layernorm",
    },
    groups=(
        ScaleGroup("qkv", _ATTENTION_INPUT, "input_layernorm", "norm"),
        ScaleGroup("o", ("self_attn.o_proj",), "self_attn.v_proj", "heads", normalized=True),
        # post_attention_layernorm follows o_proj here; the MLP is fed by pre_feedforward_layernorm.
        ScaleGroup("gate_up", _MLP_INPUT, "pre_feedforward_layernorm", "norm"),
        ScaleGroup("down", ("mlp.down_proj",), "mlp.up_proj", "rows", normalized=True),
    ),
    key_layouts=(KeyLayout("model.", "lm_head.weight"),),
    read_layouts=TEXT_READ,
    companions=(),
    not_converted=("lm_head",),
    float16=False,
)

GEMMA3_TEXT = Family(
    model_type="gemma3_text",
    title="Gemma 3 (text)",
    licence="gemma",
    end_of_turn="<end_of_turn>",
    text_type="gemma3_text",
    text_section=None,
    config_class="Gemma3TextConfig",
    model_class="Gemma3ForCausalLM",
    activation_key="hidden_activation",
    layer_kinds=(SLIDING, FULL),
    rope_per_kind=True,
    heads_per_kind=False,
    gain_offset=1.0,
    attention_softcap=False,
    query_scale="query_pre_attn_scalar",
    value_norm=False,
    layer_scalar=False,
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
        # q_norm and k_norm follow q and k, so a scale of their *input* still folds exactly.
        ScaleGroup("qkv", _ATTENTION_INPUT, "input_layernorm", "norm"),
        ScaleGroup("o", ("self_attn.o_proj",), "self_attn.v_proj", "heads", normalized=True),
        ScaleGroup("gate_up", _MLP_INPUT, "pre_feedforward_layernorm", "norm"),
        ScaleGroup("down", ("mlp.down_proj",), "mlp.up_proj", "rows", normalized=True),
    ),
    key_layouts=(KeyLayout("model.", "lm_head.weight"),),
    read_layouts=TEXT_READ,
    companions=(),
    not_converted=("lm_head",),
    float16=False,
)

GEMMA3 = Family(
    model_type="gemma3",
    title="Gemma 3 (multimodal: the language model is quantized, the vision tower is copied)",
    licence="gemma",
    end_of_turn="<end_of_turn>",
    text_type="gemma3_text",
    text_section="text_config",
    config_class="Gemma3Config",
    model_class="Gemma3ForConditionalGeneration",
    activation_key="hidden_activation",
    layer_kinds=(SLIDING, FULL),
    rope_per_kind=True,
    heads_per_kind=False,
    gain_offset=1.0,
    attention_softcap=False,
    query_scale="query_pre_attn_scalar",
    value_norm=False,
    layer_scalar=False,
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
        ScaleGroup("o", ("self_attn.o_proj",), "self_attn.v_proj", "heads", normalized=True),
        ScaleGroup("gate_up", _MLP_INPUT, "pre_feedforward_layernorm", "norm"),
        ScaleGroup("down", ("mlp.down_proj",), "mlp.up_proj", "rows", normalized=True),
    ),
    key_layouts=(
        KeyLayout("language_model.model.", "language_model.lm_head.weight"),  # the hub's files
        KeyLayout("model.language_model.", "lm_head.weight"),  # what transformers 5 calls the same modules
    ),
    read_layouts=(KeyLayout("language_model.", "lm_head.weight"),),  # a model saved without its head's class
    companions=(
        # Gemma does not use the tower's pooling head, and many checkpoints leave it out.
        Companion("vision_tower", "vision_config", "siglip.modeling_siglip.SiglipVisionModel", unused=("head",)),
        Companion(
            "multi_modal_projector", "vision_config", "gemma3.modeling_gemma3.Gemma3MultiModalProjector", "config"
        ),
    ),
    not_converted=(
        "lm_head",
        "vision_tower",
        "model.vision_tower",
        "multi_modal_projector",
        "model.multi_modal_projector",
    ),
    float16=False,
)

VAULTGEMMA = Family(
    model_type="vaultgemma",
    title="VaultGemma",
    licence="gemma",
    end_of_turn="<end_of_turn>",
    text_type="vaultgemma",
    text_section=None,
    config_class="VaultGemmaConfig",
    model_class="VaultGemmaForCausalLM",
    activation_key="hidden_activation",
    layer_kinds=(SLIDING, FULL),
    rope_per_kind=False,
    heads_per_kind=False,
    gain_offset=1.0,
    attention_softcap=True,
    query_scale="query_pre_attn_scalar",
    value_norm=False,
    layer_scalar=False,
    altup=False,
    # Gemma 2 without the norms after attention and MLP.
    norms={"input_norm": "input_layernorm", "mlp_norm": "pre_feedforward_layernorm"},
    groups=(
        ScaleGroup("qkv", _ATTENTION_INPUT, "input_layernorm", "norm"),
        ScaleGroup("o", ("self_attn.o_proj",), "self_attn.v_proj", "heads"),
        ScaleGroup("gate_up", _MLP_INPUT, "pre_feedforward_layernorm", "norm"),
        ScaleGroup("down", ("mlp.down_proj",), "mlp.up_proj", "rows"),
    ),
    key_layouts=(KeyLayout("model.", "lm_head.weight"),),
    read_layouts=TEXT_READ,
    companions=(),
    not_converted=("lm_head",),
    float16=False,
)
