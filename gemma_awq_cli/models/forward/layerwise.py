"""A text model's parts made real one at a time, from transformers' own modules and a lazily read checkpoint.

Everything here computes in float32 on one device. The causal masks, the rotary tables and the embedding's scale are
recorded from transformers' own forward, so that no family's forward is written a second time.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.gemma.config_values import HINT
from gemma_awq_cli.system.failures import library_errors

LOGIT_CHUNK = 512  # vocabulary entries that logits are computed for at a time: they stay in the cache


def meta_model(text_config: Any) -> Any:
    """transformers' causal model of this config, without memory: every parameter on the meta device."""
    from transformers import AutoModelForCausalLM

    with library_errors("transformers cannot build this model", HINT), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(text_config), dtype=torch.float32)
    return model.eval()


def parameter_shapes(model: Any, tied_head: bool) -> dict[str, torch.Size]:
    """Names and shapes of all parameters, without the head where it is the embedding."""
    shapes = {name: parameter.shape for name, parameter in model.state_dict().items()}
    if tied_head:
        shapes.pop("lm_head.weight", None)
    return shapes


class _Recorder(nn.Module):
    """Stands in for a decoder layer: keeps what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {}

    def forward(self, hidden: Tensor, **arguments: Any) -> Tensor:
        self.arguments = arguments
        return hidden


class TextStack:
    """Layers, embedding and head of one checkpoint's language model, in float32 on `device`."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self.config = checkpoint.text_config
        self.model = meta_model(self.config)
        self.shapes = parameter_shapes(self.model, checkpoint.tied_head)
        self._layers = list(self.model.model.layers)
        self._arguments: dict[int, list[dict[str, Any]]] = {}

    @property
    def softcap(self) -> float | None:
        return getattr(self.config, "final_logit_softcapping", None)

    def layer_names(self, index: int) -> list[str]:
        """The parameter names of one layer, relative to it."""
        return [name for name, _ in self._layers[index].named_parameters()]

    def read_layer(self, index: int) -> dict[str, Tensor]:
        """One layer's weights as stored, by their names relative to the layer."""
        prefix = f"model.layers.{index}."
        read = self.checkpoint.read(prefix + name for name in self.layer_names(index))
        return {name.removeprefix(prefix): tensor for name, tensor in read.items()}

    def layer(self, index: int, weights: dict[str, Tensor]) -> nn.Module:
        """The layer's module with `weights` in float32 on the device."""
        module = copy.deepcopy(self._layers[index])
        real = {name: tensor.to(self.device, torch.float32) for name, tensor in weights.items()}
        module.load_state_dict(real, assign=True)
        return module.requires_grad_(False)

    def embedder(self, ids: Tensor) -> Callable[[Tensor], Tensor]:
        """A function from token ids [R, S], all of which occur in `ids`, to the first layer's input.

        It gives [R, S, hidden] float32 on the CPU, and holds only the rows of the embedding that occur.
        """
        table = self.checkpoint.read(["model.embed_tokens.weight"])["model.embed_tokens.weight"]
        used = torch.unique(ids)
        embedding = copy.deepcopy(self.model.model.embed_tokens)
        embedding.weight = nn.Parameter(table[used].to(torch.float32), requires_grad=False)
        embedding.padding_idx = None
        scale = float(embedding.scalar_embed_scale)
        embedding.embed_scale = torch.tensor(scale)
        return lambda part: embedding(torch.searchsorted(used, part))

    def arguments(self, index: int, length: int) -> dict[str, Any]:
        """What transformers' model calls layer `index` with, for rows of `length` tokens from position 0."""
        if length not in self._arguments:
            self._arguments = {length: self._record(length)}
        return self._arguments[length][index]

    def _record(self, length: int) -> list[dict[str, Any]]:
        shell = copy.copy(self.model.model)
        shell._modules = dict(shell._modules)
        recorders = [_Recorder() for _ in self._layers]
        shell.layers = nn.ModuleList(recorders)
        shell.norm = nn.Identity()
        with torch.device(self.device):
            shell.rotary_emb = type(self.model.model.rotary_emb)(self.config)
            hidden = torch.zeros(1, length, int(self.config.hidden_size))
            shell(inputs_embeds=hidden, use_cache=False)
        return [recorder.arguments for recorder in recorders]

    def run_layer(self, index: int, module: nn.Module, hidden: Tensor) -> Tensor:
        """One layer's forward on rows [R, S, hidden] that lie on the device."""
        output = module(hidden, **self.arguments(index, hidden.shape[1]))
        return output[0] if isinstance(output, tuple) else output

    def head(self) -> tuple[nn.Module, Tensor]:
        """The final norm (float32, on the device) and the head's weight as stored [V, hidden] on the CPU."""
        name = "model.embed_tokens.weight" if self.checkpoint.tied_head else "lm_head.weight"
        weights = self.checkpoint.read(["model.norm.weight", name])
        norm = copy.deepcopy(self.model.model.norm)
        norm.load_state_dict({"weight": weights["model.norm.weight"].to(self.device, torch.float32)}, assign=True)
        return norm, weights[name]

    def logit_chunks(self, head: Tensor, normed: Tensor, chunk: int = LOGIT_CHUNK) -> Iterator[Tensor]:
        """Normed final states [R, hidden] -> logits [R, <= chunk] float32, `chunk` vocabulary entries at a time."""
        for part in head.split(chunk):
            logits = normed @ part.to(self.device, torch.float32).t()
            if self.softcap is not None:
                logits = logits.div_(self.softcap).tanh_().mul_(self.softcap)
            yield logits
