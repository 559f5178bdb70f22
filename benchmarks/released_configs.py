"""The text configs of released Gemmas, as their config.json states them: for sizes, and for files of their shapes."""

from typing import Any

from gemma_awq_cli.models.checkpoints.expected_tensors import text_tensors
from gemma_awq_cli.models.gemma.architecture import TextShape
from gemma_awq_cli.models.gemma.family import FULL, SLIDING
from gemma_awq_cli.models.packed_formats.autoawq import Gemm
from gemma_awq_cli.models.packed_formats.packed_format import Expected


def artifact_tensors(shape: TextShape, group_size: int | None) -> dict[str, Expected]:
    """The tensors of an artifact with a tied head, by their names in a text-only file. group_size: None for 16 bits."""
    if group_size is None:
        return text_tensors(shape, tied_head=True)
    packed = [layout.packed() for layout in shape.layouts]
    layout = Gemm(group_size)
    return text_tensors(shape, True, packed) | {
        f"model.layers.{index}.{name}{kind}": one
        for index, linears in enumerate(packed)
        for name, linear in linears.items()
        for kind, one in layout.expected(linear, group_size, {}).items()
    }


def _kinds(layers: int, every: int) -> list[str]:
    return [FULL if (index + 1) % every == 0 else SLIDING for index in range(layers)]


def _sizes(layers: int, hidden: int, mlp: int, heads: int, kv_heads: int, every: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": mlp, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "layer_types": _kinds(layers, every),
    }  # fmt: skip


_EVERY: dict[str, Any] = {
    "attention_bias": False, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "final_logit_softcapping": 30.0,
    "tie_word_embeddings": True, "dtype": "bfloat16",
}  # fmt: skip
_GEMMA4: dict[str, Any] = {
    **_EVERY, "model_type": "gemma4_text", "architectures": ["Gemma4ForCausalLM"], "vocab_size": 262144,
    "global_head_dim": 512, "use_bidirectional_attention": None, "max_position_embeddings": 131072,
    "sliding_window": 512, "attention_k_eq_v": False, "num_global_key_value_heads": None, "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 262144,
    "enable_moe_block": False, "num_experts": None, "top_k_experts": None, "moe_intermediate_size": None,
    "rope_parameters": {
        FULL: {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
        SLIDING: {"rope_type": "default", "rope_theta": 1e4},
    },
}  # fmt: skip
_UNIFIED = {
    name: value
    for name, value in _GEMMA4.items()
    if "expert" not in name and "per_layer" not in name and not name.startswith(("moe", "enable_moe"))
} | {"model_type": "gemma4_unified_text", "architectures": ["Gemma4UnifiedForCausalLM"]}
_KEYS_ARE_VALUES = {"attention_k_eq_v": True, "sliding_window": 1024, "max_position_embeddings": 262144}
_GEMMA3N: dict[str, Any] = {
    **_EVERY, "model_type": "gemma3n_text", "architectures": ["Gemma3nForCausalLM"], "vocab_size": 262400,
    "vocab_size_per_layer_input": 262144, "hidden_size_per_layer_input": 256, "laurel_rank": 64, "altup_num_inputs": 4,
    "altup_active_idx": 0, "altup_correct_scale": True, "altup_coef_clip": 120.0, "rope_theta": 1e6,
    "rope_local_base_freq": 1e4, "rope_scaling": None, "sliding_window": 512, "max_position_embeddings": 32768,
}  # fmt: skip


def _gemma3n(layers: int, mlp: int, shared: int) -> dict[str, Any]:
    return {
        **_GEMMA3N, **_sizes(layers, 2048, mlp, 8, 2, 5), "intermediate_size": [mlp] * layers,
        "num_kv_shared_layers": shared, "activation_sparsity_pattern": [0.95] * 10 + [0.0] * (layers - 10),
    }  # fmt: skip


_GEMMA: dict[str, Any] = {
    **{name: value for name, value in _EVERY.items() if name not in ("hidden_activation", "final_logit_softcapping")},
    "model_type": "gemma", "architectures": ["GemmaForCausalLM"], "hidden_act": "gelu_pytorch_tanh",
    "vocab_size": 256000, "max_position_embeddings": 8192, "rope_theta": 1e4, "rope_scaling": None,
}  # fmt: skip


def _gemma(*sizes: int) -> dict[str, Any]:
    return {name: value for name, value in {**_GEMMA, **_sizes(*sizes, 1)}.items() if name != "layer_types"}


RELEASED: dict[str, dict[str, Any]] = {
    "gemma-2b": _gemma(18, 2048, 16384, 8, 1),
    "gemma-7b": _gemma(28, 3072, 24576, 16, 16),
    "gemma-4-E2B": {
        **_GEMMA4, **_sizes(35, 1536, 6144, 8, 1, 5), "num_kv_shared_layers": 20, "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 256,
    },
    "gemma-4-E4B": {
        **_GEMMA4, **_sizes(42, 2560, 10240, 8, 2, 6), "num_kv_shared_layers": 18, "hidden_size_per_layer_input": 256,
    },
    "gemma-4-12B": {
        **_UNIFIED, **_KEYS_ARE_VALUES, **_sizes(48, 3840, 15360, 16, 8, 6), "num_global_key_value_heads": 1,
    },
    "gemma-4-31B": {
        **_GEMMA4, **_KEYS_ARE_VALUES, **_sizes(60, 5376, 21504, 32, 16, 6), "num_global_key_value_heads": 4,
    },
    "gemma-4-26B-A4B": {
        **_GEMMA4, **_KEYS_ARE_VALUES, **_sizes(30, 2816, 2112, 16, 8, 6), "num_global_key_value_heads": 2,
        "enable_moe_block": True, "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704,
    },
    "gemma-3n-E2B": _gemma3n(30, 8192, 10),
    "gemma-3n-E4B": _gemma3n(35, 16384, 15),
}  # fmt: skip


def first_layers(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """The config of a model of the same shapes with fewer layers, which keeps both kinds and both roles of layers."""
    shared = min(config.get("num_kv_shared_layers") or 0, max(0, layers - 2))
    kinds = ([SLIDING, FULL] * layers)[-layers:]
    small = {**config, "num_hidden_layers": layers}
    if "layer_types" in config:
        small["layer_types"] = kinds
    if "num_kv_shared_layers" in config:
        small["num_kv_shared_layers"] = shared
    for name in ("intermediate_size", "activation_sparsity_pattern"):
        if isinstance(config.get(name), list):
            small[name] = config[name][:layers]
    return small
