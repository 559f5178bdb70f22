"""A text model run layer by layer: transformers' own modules, given memory and weights one at a time.

Everything here computes in float32 on one device. The causal masks, the rotary tables and whatever else a layer is
called with are recorded from transformers' own forward, so that no family's forward is written a second time.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.kernels.head import soft_cap
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.gemma.architecture import final_softcap
from gemma_awq_cli.models.gemma.config_values import HINT
from gemma_awq_cli.models.gemma.layers import LayerLayout
from gemma_awq_cli.system.failures import library_errors

LOGIT_CHUNK = 512  # vocabulary entries whose logits are computed at a time: they stay in the processor's cache


def meta_model(text_config: Any) -> Any:
    """transformers' causal model of this config with every parameter on the meta device, where it takes no memory."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(text_config)
    if getattr(config, "enable_moe_block", False):
        # the other implementations copy the states of all tokens once for each expert that they are routed to
        config._experts_implementation = "eager"
    with library_errors("transformers cannot build this model", HINT), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()


def parameter_shapes(model: Any, tied_head: bool) -> dict[str, torch.Size]:
    """Names and shapes of all parameters and stored buffers, without the head if it is the embedding."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if tied_head:
        shapes.pop("lm_head.weight", None)
    return shapes


def require_known_matrices(shapes: Mapping[str, Sequence[int]], layouts: Sequence[LayerLayout]) -> None:
    """An error for a matrix of a layer that its layout does not name: it would silently stay in 16 bits.

    shapes: see `parameter_shapes`.
    """
    known = {
        f"model.layers.{i}.{name}" for i, layout in enumerate(layouts) for name in (*layout.unpacked(), *layout.kept)
    }
    for name, shape in shapes.items():
        if name.startswith("model.layers.") and len(shape) > 1 and name not in known:
            raise GemmaAwqError(
                f"{name} has shape {list(shape)}; this version cannot quantize it, and it would stay in 16 bits.",
                "This is an unknown kind of Gemma: please report it with the model's name.",
            )


@dataclass(frozen=True)
class LayerCall:
    """The arguments that transformers' model passes to one layer beside the hidden states."""

    positional: tuple[Any, ...] = ()
    named: Mapping[str, Any] = field(default_factory=dict)


class _Recorder(nn.Module):
    """Stands in for a decoder layer and keeps the arguments of its last call."""

    def __init__(self) -> None:
        super().__init__()
        self.call = LayerCall()

    def forward(self, hidden: Tensor, *positional: Any, **named: Any) -> Tensor:
        self.call = LayerCall(positional, named)
        return hidden


def record_calls(model: Any, config: Any, length: int, device: torch.device) -> list[LayerCall]:
    """How transformers' model calls each of its layers for rows of `length` tokens from position 0.

    model: what lies below a causal model's head, on the meta device; it stays as it is.
    """
    shell = copy.copy(model)
    shell._modules = dict(shell._modules)
    recorders = [_Recorder() for _ in model.layers]
    shell.layers = nn.ModuleList(recorders)
    shell.norm = nn.Identity()
    with torch.device(device):
        shell.rotary_emb = type(model.rotary_emb)(config)
        hidden = torch.zeros(1, length, int(config.hidden_size))
        shell(inputs_embeds=hidden, use_cache=False)
    return [recorder.call for recorder in recorders]


def real_module(module: nn.Module, weights: Mapping[str, Tensor], device: torch.device) -> nn.Module:
    """A copy of a module on the meta device with `weights` on `device`: floating-point ones in float32, others as is.

    An error if the module holds a buffer that a checkpoint does not store: there is nothing to fill it with.
    """
    made = copy.deepcopy(module)
    real = {
        name: tensor.to(device, torch.float32 if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in weights.items()
    }
    made.load_state_dict(real, assign=True)
    if empty := [name for name, buffer in made.named_buffers() if buffer.is_meta]:
        raise GemmaAwqError(
            f"transformers computes the buffer {empty[0]} of {type(module).__name__}, which this version cannot do.",
            "Install the version of transformers that this tool was tested with (constraints.txt).",
        )
    return made.requires_grad_(False)


class TextStack:
    """The layers, the embedding and the head of one checkpoint's language model, in float32 on `device`."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self.config = checkpoint.text_config
        self.model = meta_model(self.config)
        self.shapes = parameter_shapes(self.model, checkpoint.tied_head)
        require_known_matrices(self.shapes, checkpoint.shape.layouts)
        self._layers = list(self.model.model.layers)
        self._calls: dict[int, list[LayerCall]] = {}  # by the rows' length

    @property
    def softcap(self) -> float | None:
        return final_softcap(self.config)

    def layer_names(self, index: int) -> list[str]:
        """The names of one layer's parameters and stored buffers, relative to the layer."""
        return list(self._layers[index].state_dict())

    def read_layer(self, index: int) -> dict[str, Tensor]:
        """One layer's tensors as they are stored, by their names relative to the layer."""
        prefix = f"model.layers.{index}."
        read = self.checkpoint.read(prefix + name for name in self.layer_names(index))
        return {name.removeprefix(prefix): tensor for name, tensor in read.items()}

    def layer(self, index: int, weights: Mapping[str, Tensor]) -> nn.Module:
        """The layer's module with `weights` in float32 on the device."""
        return real_module(self._layers[index], weights, self.device)

    def embedder(self, ids: Tensor) -> Callable[[Tensor], Tensor]:
        """Return a function from token ids [R, S], all of which occur in `ids`, to the first layer's input.

        Its results are [R, S, hidden] float32 on the CPU. It holds only the rows of the embedding that occur in `ids`.
        """
        table = self.checkpoint.read(["model.embed_tokens.weight"])["model.embed_tokens.weight"]
        used = torch.unique(ids)
        embedding = copy.deepcopy(self.model.model.embed_tokens)
        embedding.weight = nn.Parameter(table[used].to(torch.float32), requires_grad=False)
        embedding.padding_idx = None
        scale = float(embedding.scalar_embed_scale)
        embedding.embed_scale = torch.tensor(scale)
        return lambda part: embedding(torch.searchsorted(used, part))

    def _call(self, index: int, length: int) -> LayerCall:
        """How transformers' model calls layer `index` for rows of `length` tokens; the last length is remembered."""
        if length not in self._calls:
            self._calls = {length: record_calls(self.model.model, self.config, length, self.device)}
        return self._calls[length][index]

    def run_layer(self, index: int, module: nn.Module, hidden: Tensor) -> Tensor:
        """Run one layer on rows [R, S, hidden] that lie on the device."""
        call = self._call(index, hidden.shape[1])
        output = module(hidden, *call.positional, **call.named)
        return output[0] if isinstance(output, tuple) else output

    def head(self) -> tuple[nn.Module, Tensor]:
        """The final norm in float32 on the device, and the head's weight [V, hidden] as it is stored, on the CPU."""
        name = "model.embed_tokens.weight" if self.checkpoint.tied_head else "lm_head.weight"
        weights = self.checkpoint.read(["model.norm.weight", name])
        norm = copy.deepcopy(self.model.model.norm)
        norm.load_state_dict({"weight": weights["model.norm.weight"].to(self.device, torch.float32)}, assign=True)
        return norm, weights[name]

    def logit_chunks(self, head: Tensor, normed: Tensor, chunk: int = LOGIT_CHUNK) -> Iterator[Tensor]:
        """Yield float32 logits [R, <= chunk] of normed final states [R, hidden], `chunk` entries at a time."""
        for part in head.split(chunk):
            yield soft_cap(normed @ part.to(self.device, torch.float32).t(), self.softcap)
