"""The layers of every Gemma in torch: what they do to the states of tokens, whatever these attend to.

Who runs them says how the tokens attend (`Tokens`): those of a prompt to a cache that grows, those of a decode step to
buffers that stay where they are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemma_awq_cli.kernels import plain_ops
from gemma_awq_cli.kernels.head import soft_cap
from gemma_awq_cli.models.forward.altup import (
    AltUpWeights,
    correct_streams,
    join_streams,
    laurel,
    predict_streams,
    start_streams,
)
from gemma_awq_cli.models.forward.experts import Experts
from gemma_awq_cli.models.forward.per_layer_embedding import PerLayerEmbedding, PerLayerGate
from gemma_awq_cli.models.gemma.architecture import Architecture
from gemma_awq_cli.models.gemma.rotary import Rope
from gemma_awq_cli.system.arrays import as_tensor


@dataclass(frozen=True)
class LayerWeights:
    """One layer. qkv and gate_up have joined outputs; the norms are gains [N] float32, offset included.

    qkv: without k and v in a layer that reads another's, without v where the keys are the values. scalar: [1], what the
    output is multiplied by.
    """

    qkv: nn.Module
    o: nn.Module
    gate_up: nn.Module
    down: nn.Module
    input_norm: Tensor
    attention_norm: Tensor | None  # after attention, before the residual is added
    mlp_norm: Tensor  # before the MLP
    post_mlp_norm: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    scalar: Tensor | None
    per_layer: PerLayerGate | None
    altup: AltUpWeights | None
    experts: Experts | None


@dataclass(frozen=True)
class StreamWeights:
    """What makes AltUp's further streams of the embedding, and what makes one state of all: [hidden, hidden] each."""

    starts: tuple[Tensor, ...]
    ends: tuple[Tensor, ...]


@dataclass(frozen=True)
class TextWeights:
    """embedding: [V, hidden]; embed_scale: what its rows are multiplied by, in `dtype`; norm: the final gain [hidden]
    float32; head: hidden -> logits.
    """

    arch: Architecture
    embedding: Tensor
    embed_scale: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: nn.Module
    dtype: torch.dtype
    per_layer: PerLayerEmbedding | None
    streams: StreamWeights | None

    @property
    def device(self) -> torch.device:
        return self.embedding.device


@dataclass(frozen=True)
class LayerOps:
    """What a layer computes between its products: `plain_ops`, or kernels that do the same in fewer steps."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = plain_ops.rms_norm
    add_normed: Callable[[Tensor, Tensor, Tensor | None, float], Tensor] = plain_ops.add_normed
    add_and_norm: Callable[[Tensor, Tensor, Tensor | None, Tensor, float], tuple[Tensor, Tensor]] = (
        plain_ops.add_and_norm
    )
    gated: Callable[[Tensor], Tensor] = plain_ops.gated
    place: Callable[..., Tensor] = plain_ops.place
    attend_once: Callable[..., Tensor] | None = None  # None: `plain_ops.attend_seen`, whose masks layers share


class Tokens(Protocol):
    """The tokens [T] that pass the layers together.

    embedded: [T, hidden], scaled; per_layer: their rows of the per-layer table [T, layers * width].
    """

    @property
    def embedded(self) -> Tensor: ...

    @property
    def per_layer(self) -> Tensor | None: ...

    def attended(self, index: int, qkv: Tensor) -> Tensor:
        """What the tokens see in layer `index`: the heads' outputs side by side [T, heads * head_dim].

        qkv: the layer's queries, and keys and values if it has its own [T, outputs], neither normed nor rotated.
        """
        ...


def head_facts(weights: TextWeights, index: int) -> dict[str, Any]:
    """What `plain_ops.split_qkv` has to know of layer `index`, by the names of its arguments."""
    arch, layer, layout = weights.arch, weights.layers[index], weights.arch.layouts[index]
    return {
        "q_norm": layer.q_norm,
        "k_norm": layer.k_norm,
        "heads": layout.heads,
        "kv_heads": layout.kv_heads if layout.kv_source is None else 0,
        "keys_are_values": layout.keys_are_values,
        "value_norm": layout.value_norm,
        "eps": arch.eps,
    }


@dataclass(frozen=True)
class TorchLayers:
    """The layers with their weights, and what is before and behind them."""

    weights: TextWeights
    ops: LayerOps = LayerOps()

    def embedded(self, ids: Tensor) -> Tensor:
        """The scaled embeddings [T, hidden] of tokens [T]."""
        return self.weights.embedding[ids].to(self.weights.dtype) * self.weights.embed_scale

    def start(self, embedded: Tensor) -> Tensor:
        """The first layer's input: the embedded tokens, or AltUp's streams of them [S, T, hidden]."""
        streams = self.weights.streams
        return embedded if streams is None else start_streams(embedded, streams.starts)

    def end(self, x: Tensor) -> Tensor:
        """The last layer's output as one state per token [T, hidden]."""
        return x if self.weights.streams is None else join_streams(x, self.weights.streams.ends)

    def logits(self, states: Tensor) -> Tensor:
        """Final states [R, hidden] -> [R, V] float32."""
        arch = self.weights.arch
        normed = self.ops.rms_norm(states, self.weights.norm, arch.eps)
        return soft_cap(self.weights.head(normed).to(torch.float32), arch.final_softcap)

    def output(self, index: int, x: Tensor, tokens: Tokens) -> Tensor:
        """States [T, hidden], or AltUp's streams [S, T, hidden], through one layer."""
        layer, eps = self.weights.layers[index], self.weights.arch.eps
        if layer.altup is not None:
            return self._altup_output(index, layer, layer.altup, x, tokens)
        change = self._attention(index, layer, self.ops.rms_norm(x, layer.input_norm, eps), tokens)
        x, normed = self.ops.add_and_norm(x, change, layer.attention_norm, layer.mlp_norm, eps)
        x = self.ops.add_normed(x, self._mlp(index, layer, x, normed), layer.post_mlp_norm, eps)
        if layer.per_layer is not None:
            x = x + layer.per_layer.output(x, self._layer_input(index, tokens))
        return x if layer.scalar is None else x * layer.scalar

    def _altup_output(
        self, index: int, layer: LayerWeights, altup: AltUpWeights, streams: Tensor, tokens: Tokens
    ) -> Tensor:
        eps = self.weights.arch.eps
        predicted = predict_streams(altup, streams)
        x = predicted[altup.active]
        normed = self.ops.rms_norm(x, layer.input_norm, altup.eps)
        change = self._attention(index, layer, normed, tokens)
        x = (self.ops.add_normed(x, change, layer.attention_norm, eps) + laurel(altup, normed)) / 2.0**0.5
        normed = self.ops.rms_norm(x, layer.mlp_norm, eps)
        x = self.ops.add_normed(x, self._mlp(index, layer, x, normed), layer.post_mlp_norm, eps)
        corrected = correct_streams(altup, predicted, x)
        assert layer.per_layer is not None
        active = corrected[altup.active]
        active = active if altup.output_scale is None else active * altup.output_scale
        corrected[1:] += layer.per_layer.output(active, self._layer_input(index, tokens))
        return corrected

    def _layer_input(self, index: int, tokens: Tokens) -> Tensor:
        """The per-layer input [T, width]."""
        embedding = self.weights.per_layer
        assert embedding is not None
        assert tokens.per_layer is not None
        return embedding.of_layer(index, tokens.embedded, tokens.per_layer)

    def _attention(self, index: int, layer: LayerWeights, normed: Tensor, tokens: Tokens) -> Tensor:
        """The layer's attention [T, hidden]. normed: its normed input [T, hidden]."""
        return layer.o(tokens.attended(index, layer.qkv(normed)))

    def _mlp(self, index: int, layer: LayerWeights, x: Tensor, normed: Tensor) -> Tensor:
        """What MLP and experts make of the residual stream x [T, hidden]. normed: the same behind the MLP's norm."""
        layout = self.weights.arch.layouts[index]
        gate_up = layer.gate_up(normed)
        if layout.sparsity:
            gate, up = gate_up.split(layout.intermediate, -1)
            output = layer.down(F.gelu(sparse_gate(gate, layout.sparsity), approximate="tanh") * up)
        else:
            output = layer.down(self.ops.gated(gate_up))
        return output if layer.experts is None else layer.experts.beside(output, x)


class Rotary:
    """The rotary embeddings of a model's layers on one device."""

    def __init__(self, arch: Architecture, device: torch.device) -> None:
        self._ropes: tuple[Rope, ...] = arch.ropes
        by_rope = {id(rope): as_tensor(rope.inv_freq).to(device) for rope in arch.ropes}
        self._frequencies = [by_rope[id(rope)] for rope in arch.ropes]

    def angles(
        self, index: int, positions: Tensor, dtype: torch.dtype, known: dict[int, tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """The cosines and sines [T, 1, head_dim / 2] of layer `index` for tokens at positions [T].

        known: those of these tokens that were computed before, by rope; this call's are added.
        """
        rope = self._ropes[index]
        if id(rope) not in known:
            freqs = positions[:, None].to(torch.float32) * self._frequencies[index]
            cos, sin = ((part * rope.factor).to(dtype)[:, None] for part in (freqs.cos(), freqs.sin()))
            known[id(rope)] = cos, sin
        return known[id(rope)]


def sparse_gate(gate: Tensor, share: float) -> Tensor:
    """What exceeds a row's cutoff, and 0 elsewhere: of a normal distribution, `share` of the channels. gate: [T, N]."""
    cutoff = gate.mean(-1, keepdim=True) + gate.std(-1, keepdim=True, unbiased=False) * _deviations(share, gate.dtype)
    return F.relu(gate - cutoff)


@cache
def _deviations(share: float, dtype: torch.dtype) -> float:
    """How many deviations above the mean leave a share of a normal distribution below them, as a dtype holds it."""
    return float(torch.tensor(NormalDist().inv_cdf(share), dtype=dtype))
