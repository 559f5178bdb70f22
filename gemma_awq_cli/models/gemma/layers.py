"""The layers of one language model, each as data: its sizes, its linears and norms, and which linears share an input.

Every question about a layer is answered here, per layer: nothing may assume that a model's layers are alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gemma_awq_cli.models.gemma.families import FULL, SLIDING, Family, ScaleGroup


@dataclass(frozen=True)
class Linear:
    """A linear's weight is [outputs, inputs]."""

    outputs: int
    inputs: int
    bias: bool = False


@dataclass(frozen=True)
class Norm:
    """An RMSNorm: its module's name in the layer, and how many channels it has."""

    name: str
    size: int


@dataclass(frozen=True)
class LayerLayout:
    """One decoder layer. Names are relative to the layer.

    kind: FULL or SLIDING, as the config spells it.
    window: how many tokens a query sees, itself included; None: all before it.
    rope: the rotary parameters, as the config has them.
    linears: every linear by its name; all of them become 4-bit.
    norms: every RMSNorm by its slot in the forward; a slot that this layer lacks is absent.
    """

    kind: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    window: int | None
    rope: Mapping[str, Any]
    linears: Mapping[str, Linear]
    norms: Mapping[str, Norm]
    groups: tuple[ScaleGroup, ...]

    @property
    def query_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim

    def joined(self, linears: tuple[str, ...]) -> Linear:
        """Linears with the same input, as one: their outputs side by side."""
        parts = [self.linears[name] for name in linears]
        return Linear(sum(part.outputs for part in parts), parts[0].inputs, any(part.bias for part in parts))


def layers_of(config: Any, family: Family) -> tuple[LayerLayout, ...]:
    """Every layer of the model that a text config describes, in order."""
    kinds = getattr(config, "layer_types", None) or [FULL] * config.num_hidden_layers
    made = {kind: _layer(config, family, kind) for kind in dict.fromkeys(kinds)}
    return tuple(made[kind] for kind in kinds)


def _layer(config: Any, family: Family, kind: str) -> LayerLayout:
    hidden, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    head_dim = int(getattr(config, "head_dim", None) or hidden // heads)
    intermediate = config.intermediate_size
    bias = bool(config.attention_bias)
    linears = {
        "self_attn.q_proj": Linear(heads * head_dim, hidden, bias),
        "self_attn.k_proj": Linear(kv_heads * head_dim, hidden, bias),
        "self_attn.v_proj": Linear(kv_heads * head_dim, hidden, bias),
        "self_attn.o_proj": Linear(hidden, heads * head_dim, bias),
        "mlp.gate_proj": Linear(intermediate, hidden),
        "mlp.up_proj": Linear(intermediate, hidden),
        "mlp.down_proj": Linear(hidden, intermediate),
    }
    norms = {
        slot: Norm(name, head_dim if slot in ("q_norm", "k_norm") else hidden) for slot, name in family.norms.items()
    }
    window = config.sliding_window if kind == SLIDING else None
    rope = config.rope_parameters[kind] if family.rope_per_kind else config.rope_parameters
    return LayerLayout(
        kind, hidden, heads, kv_heads, head_dim, intermediate, window, rope, linears, norms, family.groups
    )
