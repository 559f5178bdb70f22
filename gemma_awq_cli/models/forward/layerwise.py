"""A text model run layer by layer: transformers' own modules, given memory and weights one at a time.

Everything here computes in float32 on one device. The causal masks, the rotary tables and whatever else a layer is
called with are recorded from transformers' own forward, so that no family's forward is written a second time. What
comes before the first layer and after the last one runs in that forward too, with other layers in place of its own.

Rows are [R, S, hidden]; with alternating updates (AltUp) they are [R, streams, S, hidden].
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.kernels.head import soft_cap
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward.memory import copies_from_pinned, device_memory
from gemma_awq_cli.models.forward.per_layer_inputs import PerLayerInputs
from gemma_awq_cli.models.gemma.architecture import final_softcap
from gemma_awq_cli.models.gemma.config_values import HINT
from gemma_awq_cli.models.gemma.layers import LayerLayout
from gemma_awq_cli.system.failures import library_errors

# By the index of a layer: its keys, normalized and rotated, and its values [R, kv heads, S, head_dim].
KeysAndValues = dict[int, tuple[Tensor, Tensor]]

Product = Callable[[Tensor], Callable[[Tensor], Tensor]]  # `product`, or what computes nearly the same

_SHARED = "shared_kv_states"  # the argument of a layer that holds keys and values by the layers' kind
_ALTUP_STARTS, _ALTUP_ENDS = "altup_projections", "altup_unembed_projections"
LOGIT_CHUNK = 512  # vocabulary entries whose logits are computed at a time: they stay in the processor's cache
GPU_LOGIT_CHUNK = 4096  # the same on a GPU, where every chunk starts some kernels


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


class _PerLayerInput:
    """Stands for the per-layer inputs of all layers, and of any one of them: the real ones depend on the tokens."""

    def __getitem__(self, _: object) -> Self:
        return self


_PER_LAYER_INPUT = _PerLayerInput()


class _Recorder(nn.Module):
    """Stands in for a decoder layer and keeps what it was called with last."""

    def __init__(self) -> None:
        super().__init__()
        self.call = LayerCall()
        self.hidden = torch.empty(0)

    def forward(self, hidden: Tensor, *positional: Any, **named: Any) -> Tensor:
        self.hidden, self.call = hidden, LayerCall(positional, named)
        return hidden


class _Given(nn.Module):
    """Stands in for all decoder layers: returns what it was given as the last one's output."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = torch.empty(0)

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return self.hidden


def _shell(model: Any, config: Any, layers: Iterable[nn.Module], device: torch.device) -> Any:
    """transformers' text model around other layers, with nothing of its own before and after them that has weights.

    model: what lies below a causal model's head, on the meta device; it stays as it is.
    """
    shell = copy.copy(model)
    shell._modules = dict(shell._modules)
    shell.layers = nn.ModuleList(layers)
    shell.norm = nn.Identity()
    for name in (_ALTUP_STARTS, _ALTUP_ENDS):
        if name in shell._modules:
            setattr(shell, name, nn.ModuleList(nn.Identity() for _ in shell._modules[name]))
    for name in ("get_per_layer_inputs", "project_per_layer_inputs"):
        setattr(shell, name, lambda *_, **__: _PER_LAYER_INPUT)
    with torch.device(device):
        shell.rotary_emb = type(model.rotary_emb)(config)
    return shell


def record_calls(model: Any, config: Any, length: int, device: torch.device) -> list[LayerCall]:
    """How transformers' model calls each of its layers for rows of `length` tokens from position 0.

    model: what lies below a causal model's head, on the meta device; it stays as it is.
    """
    recorders = [_Recorder() for _ in model.layers]
    shell = _shell(model, config, recorders, device)
    shell(inputs_embeds=torch.zeros(1, length, int(config.hidden_size), device=device), use_cache=False)
    return [recorder.call for recorder in recorders]


def compute_buffers(module: nn.Module, initialize: Callable[[nn.Module], object] | None, device: torch.device) -> None:
    """Give the buffers of a module on the meta device that a checkpoint does not store the values that they start with.

    initialize: transformers' way to compute them, a model's `_init_weights`. It sets parameters of the same submodule
    too, so the stored ones are loaded afterwards. An error if there is a buffer that it leaves as it is.
    """
    for owner in module.modules():
        computed = [name for name in owner._non_persistent_buffers_set if getattr(owner, name).is_meta]
        for name in computed:
            dtype = getattr(owner, name).dtype
            empty = torch.nan if dtype.is_floating_point else -1
            setattr(owner, name, torch.full(getattr(owner, name).shape, empty, dtype=dtype, device=device))
        if computed and initialize is not None:
            initialize(owner)
        for name in computed:
            buffer = getattr(owner, name)
            if not buffer.is_floating_point() or buffer.isnan().any():
                raise GemmaAwqError(
                    f"transformers computes the buffer {name} of {type(owner).__name__}, which this version cannot do.",
                    "Install the version of transformers that this tool was tested with (constraints.txt).",
                )


def real_module(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    device: torch.device,
    initialize: Callable[[nn.Module], object] | None = None,
) -> nn.Module:
    """A copy of a module on the meta device with `weights` on `device`: floating-point ones in float32, others as is.

    initialize: see `compute_buffers`.
    """
    made = copy.deepcopy(module)
    compute_buffers(made, initialize, device)
    real = {
        # converted on the device: half of the bytes travel, and no processor core converts them
        name: tensor.to(device).to(torch.float32) if tensor.is_floating_point() else tensor.to(device)
        for name, tensor in weights.items()
    }
    made.load_state_dict(real, assign=True)
    return made.requires_grad_(False)


def product(left: Tensor) -> Callable[[Tensor], Tensor]:
    """Return what multiplies left [R, K] with the transpose of right [N, K] of any precision: [R, N] float32."""
    return lambda right: left @ right.to(torch.float32).t()


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
        self._calls: dict[tuple[int, bool], list[LayerCall]] = {}  # by the rows' length and the mode
        self._ahead: tuple[int, Future[dict[str, Tensor]]] | None = None  # the layer that is being read

    @property
    def softcap(self) -> float | None:
        return final_softcap(self.config)

    def layer_names(self, index: int) -> list[str]:
        """The names of one layer's parameters and stored buffers, relative to the layer."""
        return list(self._layers[index].state_dict())

    def read_layer(self, index: int) -> dict[str, Tensor]:
        """One layer's tensors as they are stored, by their names relative to the layer."""
        if self._ahead is None or self._ahead[0] != index:
            return self._read(index)
        (_, read), self._ahead = self._ahead, None
        return read.result()

    def read_ahead(self, index: int) -> None:
        """Let another thread read a layer that `read_layer` will be asked for next, if a GPU computes meanwhile.

        The layer's tensors are then in memory already, and for CUDA's GPUs in memory that they copy fast from.
        """
        begun = self._ahead is not None and self._ahead[0] == index
        if not begun and device_memory(self.device) is not None:
            self._ahead = index, self._reader.submit(self._read_for_device, index)

    @cached_property
    def _reader(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, "read-ahead")

    def _read_for_device(self, index: int) -> dict[str, Tensor]:
        tensors = self._read(index)
        if copies_from_pinned(self.device):
            tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        return tensors

    def _read(self, index: int) -> dict[str, Tensor]:
        prefix = f"model.layers.{index}."
        read = self.checkpoint.read(prefix + name for name in self.layer_names(index))
        return {name.removeprefix(prefix): tensor for name, tensor in read.items()}

    def reading(self, checkpoint: Checkpoint) -> "TextStack":
        """The same model with the weights of another checkpoint of it."""
        other = copy.copy(self)
        other.checkpoint = checkpoint
        other._ahead = None
        vars(other).pop("_per_layer_inputs", None)
        return other

    def layer(self, index: int, weights: Mapping[str, Tensor]) -> nn.Module:
        """The layer's module with `weights` in float32 on the device."""
        return real_module(self._layers[index], weights, self.device, self.model.model._init_weights)

    def embedder(self, ids: Tensor) -> Callable[[Tensor], Tensor]:
        """Return a function from token ids [R, S], all of which occur in `ids`, to the first layer's input.

        Its results are float32 on the CPU. It holds only the rows of the embedding that occur in `ids`.
        """
        table = self.checkpoint.read(["model.embed_tokens.weight"])["model.embed_tokens.weight"]
        used = torch.unique(ids)
        embedding = copy.deepcopy(self.model.model.embed_tokens)
        embedding.weight = nn.Parameter(table[used].to(torch.float32), requires_grad=False)
        embedding.padding_idx = None
        scale = float(embedding.scalar_embed_scale)
        embedding.embed_scale = torch.tensor(scale)
        begin = self._start()
        return lambda part: begin(embedding(torch.searchsorted(used, part)))

    def _start(self) -> Callable[[Tensor], Tensor]:
        """A function from embedded tokens [R, S, hidden] to the first layer's input, both on the CPU."""
        if self.checkpoint.shape.altup is None:
            return lambda embedded: embedded
        recorder = _Recorder()
        shell = _shell(self.model.model, self.config, [recorder], torch.device("cpu"))
        setattr(shell, _ALTUP_STARTS, self._outer(_ALTUP_STARTS, torch.device("cpu")))

        def streams(embedded: Tensor) -> Tensor:
            shell(inputs_embeds=embedded, use_cache=False)
            return recorder.hidden.transpose(0, 1)

        return streams

    def _outer(self, name: str, device: torch.device) -> nn.Module:
        """A module outside the layers with its stored weights in float32."""
        module, prefix = self.model.model.get_submodule(name), f"model.{name}."
        read = self.checkpoint.read(prefix + key for key in module.state_dict())
        return real_module(module, {key.removeprefix(prefix): tensor for key, tensor in read.items()}, device)

    def _call(self, index: int, length: int) -> LayerCall:
        """How transformers' model calls layer `index` for rows of `length` tokens; the last length is remembered."""
        key = (length, torch.is_inference_mode_enabled())  # whose tensors cannot be kept for a gradient
        if key not in self._calls:
            self._calls = {key: record_calls(self.model.model, self.config, length, self.device)}
        return self._calls[key][index]

    @cached_property
    def _per_layer_inputs(self) -> PerLayerInputs:
        return PerLayerInputs(self.checkpoint)

    def run_layer(
        self,
        index: int,
        module: nn.Module,
        hidden: Tensor,
        ids: Tensor | None = None,
        shared: KeysAndValues | None = None,
    ) -> Tensor:
        """Run one layer on rows, on the device.

        ids: [R, S], their tokens, which only a model with per-layer inputs needs; shared: where a layer finds the keys
        and values of its source, and a source puts its own. A model without shared ones needs none.
        """
        shape, call = self.checkpoint.shape, self._call(index, hidden.shape[-2])
        layout, given = shape.layouts[index], dict(call.named)
        if _SHARED in given:
            given[_SHARED] = states = type(given[_SHARED])()
            if layout.kv_source is not None:
                assert shared is not None
                states[layout.kind] = tuple(part.to(self.device) for part in shared[layout.kv_source])

        def real(argument: Any) -> Any:
            if argument is not _PER_LAYER_INPUT:
                return argument
            assert ids is not None
            return self._per_layer_inputs.of_layer(index, ids, self.device)

        hidden = hidden.to(self.device)
        output = module(
            hidden if shape.altup is None else hidden.transpose(0, 1),
            *map(real, call.positional),
            **{name: real(argument) for name, argument in given.items()},
        )
        if index in shape.kv_sources and shared is not None:
            shared[index] = states[layout.kind]
        output = output[0] if isinstance(output, tuple) else output
        return output if shape.altup is None else output.transpose(0, 1)

    def carried(self, index: int, module: Any, hidden: Tensor) -> Tensor:
        """What a layer would return for rows on the device if its attention and MLP added nothing to them."""
        if self.checkpoint.shape.altup is not None:
            predicted: Tensor = module.altup.predict(hidden.transpose(0, 1))
            return predicted.transpose(0, 1)
        scaled: Tensor = hidden * module.layer_scalar if "layer_scalar" in self.layer_names(index) else hidden
        return scaled

    def head(self) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """What follows the last layer, and the head's weight [V, hidden] as it is stored, on the device.

        The former is a function from the last layer's output on the device to normalized float32 [R, S, hidden].
        """
        name = "model.embed_tokens.weight" if self.checkpoint.tied_head else "lm_head.weight"
        weight = self.checkpoint.read([name])[name].to(self.device)
        norm = self._outer("norm", self.device)
        if self.checkpoint.shape.altup is None:
            return norm, weight
        given = _Given()
        shell = _shell(self.model.model, self.config, [given], self.device)
        setattr(shell, _ALTUP_ENDS, self._outer(_ALTUP_ENDS, self.device))
        shell.norm = norm

        def end(states: Tensor) -> Tensor:
            given.hidden = states.transpose(0, 1)
            final: Tensor = shell(inputs_embeds=states[:, 0], use_cache=False).last_hidden_state
            return final

        return end, weight

    def logit_chunks(
        self, head: Tensor, normed: Tensor, chunk: int | None = None, multiply: Product = product
    ) -> Iterator[Tensor]:
        """Yield float32 logits [R, <= chunk] of normed final states [R, hidden], `chunk` entries at a time.

        By default they are `logit_chunk` of the device. multiply: the states with rows of the head.
        """
        times = multiply(normed)
        for part in head.split(chunk or logit_chunk(self.device)):
            yield soft_cap(times(part), self.softcap)


def logit_chunk(device: torch.device) -> int:
    """Return how many vocabulary entries' logits are computed at a time."""
    return LOGIT_CHUNK if device.type == "cpu" else GPU_LOGIT_CHUNK
