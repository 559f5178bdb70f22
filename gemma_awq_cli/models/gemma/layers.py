"""The layers of one language model, each as data: its sizes, its linears and norms, and which linears share an input.

Every question about a layer is answered here, per layer: nothing may assume that a model's layers are alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from gemma_awq_cli.models.gemma.family import FULL, SLIDING, Family, ScaleGroup

GATE_UP, DOWN = "experts.gate_up_proj", "experts.down_proj"  # the 16-bit experts of a layer, stacked


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


class Place(NamedTuple):
    """Where the weight [outputs, inputs] of a linear lies in a 16-bit file: `tensors[tensor][part]`.

    tensor: its full name in the layer; part: empty if the tensor is the weight itself.
    """

    tensor: str
    part: tuple[int | slice, ...] = ()


@dataclass(frozen=True)
class Experts:
    """The experts of a layer, each a gated MLP of its own. A router sends every token to `active` of `count`.

    A 16-bit file stacks them: GATE_UP [count, 2 * intermediate, hidden], the rows of the gate first, and DOWN
    [count, hidden, intermediate]. An artifact has 2-D linears `experts.E.gate_proj`, `up_proj` and `down_proj`.

    gate_up: one scale for all experts, which the norm takes up; down: one scale per expert, which its up_proj takes up.
    Their names are relative to one expert, but for the norm's.
    """

    count: int
    active: int
    intermediate: int
    hidden: int
    gate_up: ScaleGroup
    down: ScaleGroup

    def linears(self, expert: int) -> dict[str, Linear]:
        """The linears of one expert by their names in the layer."""
        return {
            f"experts.{expert}.gate_proj": Linear(self.intermediate, self.hidden),
            f"experts.{expert}.up_proj": Linear(self.intermediate, self.hidden),
            f"experts.{expert}.down_proj": Linear(self.hidden, self.intermediate),
        }

    def places(self, expert: int) -> dict[str, Place]:
        """Where the weights of one expert lie, by the names of its linears in the layer."""
        own = self.intermediate
        return {
            f"experts.{expert}.gate_proj": Place(GATE_UP, (expert, slice(0, own))),
            f"experts.{expert}.up_proj": Place(GATE_UP, (expert, slice(own, 2 * own))),
            f"experts.{expert}.down_proj": Place(DOWN, (expert,)),
        }

    def stacked(self) -> dict[str, tuple[int, ...]]:
        """The 16-bit tensors of all experts, by their names in the layer."""
        return {
            GATE_UP: (self.count, 2 * self.intermediate, self.hidden),
            DOWN: (self.count, self.hidden, self.intermediate),
        }


@dataclass(frozen=True)
class LayerLayout:
    """One decoder layer. Names are relative to the layer.

    kind: FULL or SLIDING, as the config spells it.
    window: how many tokens a query sees, itself included; None: all before it.
    rope: the rotary parameters, as the config has them.
    linears: every linear outside the experts that becomes 4-bit, by its name.
    norms: every RMSNorm with a gain by its slot in the forward; a slot that this layer lacks is absent.
    groups: of `linears`; the experts have their own.
    kept: the shapes of all other tensors, which stay in 16 bits, by their full names.
    kv_source: the index of the layer whose keys and values this one reads; None: it has its own.
    keys_are_values: whether the values are the keys as k_proj returns them, before norm and rotation.
    value_norm: whether values are normalized, without a gain.
    per_layer_width: channels of the per-layer input; 0: none.
    sparsity: the share of the gate's channels that are cut off, by the mean and deviation of the row; 0: none.
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
    kept: Mapping[str, tuple[int, ...]]
    kv_source: int | None
    keys_are_values: bool
    value_norm: bool
    per_layer_width: int
    sparsity: float
    experts: Experts | None

    @property
    def kv_size(self) -> int:
        """Outputs of k_proj, and of v_proj where there is one. 0 in a layer that reads another's keys and values."""
        return self.kv_heads * self.head_dim if self.kv_source is None else 0

    def joined(self, linears: tuple[str, ...]) -> Linear:
        """Linears with the same input, as one: their outputs side by side."""
        parts = [self.linears[name] for name in linears]
        return Linear(sum(part.outputs for part in parts), parts[0].inputs, any(part.bias for part in parts))

    def packed(self) -> dict[str, Linear]:
        """Every linear that an artifact packs, those of the experts included."""
        experts = self.experts
        own = {} if experts is None else {n: one for e in range(experts.count) for n, one in experts.linears(e).items()}
        return {**self.linears, **own}

    def places(self) -> dict[str, Place]:
        """Where the weights of the linears of `packed` lie in a 16-bit file."""
        experts = self.experts
        own = {} if experts is None else {n: p for e in range(experts.count) for n, p in experts.places(e).items()}
        return {**{name: Place(f"{name}.weight") for name in self.linears}, **own}

    def unpacked(self) -> dict[str, tuple[int, ...]]:
        """The 16-bit tensors that an artifact packs, by their full names: the weights of linears, and the experts."""
        weights = {f"{name}.weight": (one.outputs, one.inputs) for name, one in self.linears.items()}
        return {**weights, **({} if self.experts is None else self.experts.stacked())}


def layers_of(config: Any, family: Family) -> tuple[LayerLayout, ...]:
    """Every layer of the model that a text config describes, in order."""
    kinds = getattr(config, "layer_types", None) or [FULL] * config.num_hidden_layers
    made: dict[tuple[object, ...], LayerLayout] = {}  # most layers are alike
    layouts = []
    for index, kind in enumerate(kinds):
        kv_source = _kv_source(config, kinds, index)
        intermediate = _intermediate(config, index, kv_source is not None)
        sparsity = float(_at(config, "activation_sparsity_pattern", index, 0.0))
        own = (kind, kv_source, intermediate, sparsity)
        if own not in made:
            made[own] = _layer(config, family, index, kind, kv_source, intermediate, sparsity)
        layouts.append(made[own])
    return tuple(layouts)


def _at(config: Any, name: str, index: int, default: Any) -> Any:
    """A config value that may be one for all layers or a list of one per layer."""
    value = getattr(config, name, None)
    value = value[index] if isinstance(value, list | tuple) else value
    return default if value is None else value


def _kv_source(config: Any, kinds: list[str], index: int) -> int | None:
    """The last layer of the same kind that has keys and values of its own, for the layers at the end that have none."""
    first = len(kinds) - (getattr(config, "num_kv_shared_layers", None) or 0)
    return None if index < first else max(i for i in range(first) if kinds[i] == kinds[index])


def _intermediate(config: Any, index: int, reads_kv: bool) -> int:
    wide = reads_kv and getattr(config, "use_double_wide_mlp", False)
    return int(_at(config, "intermediate_size", index, None)) * (2 if wide else 1)


def _layer(
    config: Any, family: Family, index: int, kind: str, kv_source: int | None, intermediate: int, sparsity: float
) -> LayerLayout:
    sizes = config.per_layer_config[index] if family.heads_per_kind else config
    hidden, heads, kv_heads = config.hidden_size, config.num_attention_heads, sizes.num_key_value_heads
    head_dim = int(getattr(sizes, "head_dim", None) or hidden // heads)
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
    keys_are_values = kind == FULL and bool(getattr(config, "attention_k_eq_v", False))
    width = getattr(config, "hidden_size_per_layer_input", None) or 0
    experts = _experts(config, hidden) if getattr(config, "enable_moe_block", False) else None
    lacks = [] if kv_source is None else ["self_attn.k_proj", "self_attn.v_proj", "k_norm"]
    lacks += ["self_attn.v_proj"] if keys_are_values else []
    lacks += [] if width else ["per_layer_norm"]
    lacks += [] if experts else ["dense_norm", "experts_norm", "post_experts_norm"]
    groups = (
        ScaleGroup(group.name, tuple(n for n in group.linears if n not in lacks), group.source, group.fold,
                   group.normalized)
        for group in family.groups
    )  # fmt: skip
    return LayerLayout(
        kind=kind,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=intermediate,
        window=config.sliding_window if kind == SLIDING else None,
        rope=config.rope_parameters[kind] if family.rope_per_kind else config.rope_parameters,
        linears={name: linear for name, linear in linears.items() if name not in lacks},
        norms={
            slot: Norm(name, head_dim if slot in ("q_norm", "k_norm") else hidden)
            for slot, name in family.norms.items()
            if slot not in lacks
        },
        groups=tuple(groups),
        kept=_kept(config, family, hidden, width, experts),
        kv_source=kv_source,
        keys_are_values=keys_are_values,
        value_norm=family.value_norm,
        per_layer_width=width,
        sparsity=sparsity,
        experts=experts,
    )


def _experts(config: Any, hidden: int) -> Experts:
    return Experts(
        count=config.num_experts,
        active=config.top_k_experts,
        intermediate=config.moe_intermediate_size,
        hidden=hidden,
        gate_up=ScaleGroup("experts_gate_up", ("gate_proj", "up_proj"), "pre_feedforward_layernorm_2", "norm"),
        # A norm follows the sum of the experts' outputs.
        down=ScaleGroup("experts_down", ("down_proj",), "up_proj", "rows", normalized=True),
    )


def _kept(config: Any, family: Family, hidden: int, width: int, experts: Experts | None) -> dict[str, tuple[int, ...]]:
    """The tensors that stay in 16 bits beside the norms."""
    kept: dict[str, tuple[int, ...]] = {}
    if family.layer_scalar:
        kept["layer_scalar"] = (1,)
    if width:
        kept["per_layer_input_gate.weight"] = (width, hidden)
        kept["per_layer_projection.weight"] = (hidden, width)
    if experts:
        kept["router.proj.weight"] = (experts.count, hidden)
        kept["router.scale"] = (hidden,)
        kept["router.per_expert_scale"] = (experts.count,)
    if family.altup:
        streams, rank = config.altup_num_inputs, config.laurel_rank
        kept["altup.correct_output_scale"] = (hidden,)
        kept["altup.correction_coefs.weight"] = (streams, streams)
        kept["altup.prediction_coefs.weight"] = (streams**2, streams)
        kept["altup.modality_router.weight"] = (streams, hidden)
        kept["laurel.linear_left.weight"] = (rank, hidden)
        kept["laurel.linear_right.weight"] = (hidden, rank)
    return kept
