"""What the forward of one model needs beyond the plainest Gemma's, as names that a forward can declare.

The plainest is Gemma 1's: RMSNorms before attention and MLP, full attention over grouped heads, one rotary embedding,
a gated MLP with the tanh approximation of GELU. A forward declares the names below that it implements; whatever a model
needs beyond them is why that forward cannot run it.
"""

from collections.abc import Mapping
from typing import Any

from gemma_awq_cli.models.gemma.config_values import ACTIVATIONS
from gemma_awq_cli.models.gemma.family import SLIDING, Family
from gemma_awq_cli.models.gemma.layers import layers_of

ACTIVATION = "gelu_pytorch_tanh"

# Name -> what it is, as a noun phrase for messages. An activation is its own name.
FEATURES: Mapping[str, str] = {
    "post_norms": "norms after attention and MLP",
    "qk_norm": "normalized queries and keys",
    "attention_softcap": "soft-capped attention scores",
    "final_softcap": "soft-capped logits",
    "sliding_window": "sliding-window attention",
    "attention_bias": "attention biases",
    "bidirectional": "bidirectional attention",
    "value_norm": "normalized values",
    "keys_are_values": "values that are the keys",
    "shared_kv": "layers that share keys and values",
    "per_layer_inputs": "per-layer embeddings",
    "layer_scalar": "a scalar per layer",
    "altup": "alternating updates (AltUp)",
    "sparse_gate": "a sparse gate",
    "experts": "experts",
    "longrope": "a rotary embedding that changes with the length of the text (longrope)",
    **{name: f"the activation {name}" for name in ACTIVATIONS if name != ACTIVATION},
}


def features_of(config: Any, family: Family) -> frozenset[str]:
    """The names in `FEATURES` that a text config's forward needs. config: a `Checkpoint`'s facts."""
    layers = layers_of(config, family)
    needed = {
        "post_norms": "attention_norm" in family.norms,
        "qk_norm": "q_norm" in family.norms,
        "attention_softcap": family.attention_softcap and config.attn_logit_softcapping is not None,
        "final_softcap": getattr(config, "final_logit_softcapping", None) is not None,
        "sliding_window": any(layer.kind == SLIDING for layer in layers),
        "attention_bias": config.attention_bias,
        # "vision": between the tokens of one image
        "bidirectional": getattr(config, "use_bidirectional_attention", None) not in (None, False, "vision"),
        "value_norm": family.value_norm,
        "keys_are_values": any(layer.keys_are_values for layer in layers),
        "shared_kv": any(layer.kv_source is not None for layer in layers),
        "per_layer_inputs": any(layer.per_layer_width for layer in layers),
        "layer_scalar": family.layer_scalar,
        "altup": family.altup,
        "sparse_gate": any(layer.sparsity for layer in layers),
        "experts": any(layer.experts for layer in layers),
        "longrope": any(layer.rope.get("rope_type") == "longrope" for layer in layers),
    }
    names = {name for name, is_needed in needed.items() if is_needed}
    return frozenset(names | ({getattr(config, family.activation_key)} - {ACTIVATION}))


def missing_features(needed: frozenset[str], known: frozenset[str]) -> str | None:
    """Why a forward that knows the features `known` cannot run a model that needs `needed`, or None if it can."""
    missing = [FEATURES[name] for name in sorted(needed - known)]
    return f"no support for {' or '.join(missing)}" if missing else None
