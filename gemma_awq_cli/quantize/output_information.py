"""The Fisher information of the outputs of every linear: what an error of the outputs does to the predictions.

It is the mean over tokens of `g^T g`, where g [N] is the gradient, at the outputs of the 16-bit model's linear, of the
log probability of labels that are sampled from the model's own predictions; see `label_gradient` for what is taken
instead. The BOS, whose gradient is far larger than any other's, is left out.

A few calibration rows run through the layers, and their input of each layer is kept on the disk. Then the gradient runs
back, one layer at a time: the layer is run again on its input, and what it needs for its gradient lives only until the
batch is done. Weights get no gradients. The linears of experts are left out: one expert sees too few tokens.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gemma_awq_cli.awq.gram import add_products, mirror
from gemma_awq_cli.awq.ordered_sums import running_sums
from gemma_awq_cli.awq.precision import matmul_precision
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.kernels.head import soft_cap
from gemma_awq_cli.models.forward.layerwise import KeysAndValues, TextStack
from gemma_awq_cli.models.forward.memory import return_freed_memory
from gemma_awq_cli.models.gemma.layers import LayerLayout
from gemma_awq_cli.quantize.information_files import GRADIENT, INFORMATION, INPUT, InformationFiles
from gemma_awq_cli.quantize.information_layout import LOGITS, matrix_sizes, measured_rows
from gemma_awq_cli.quantize.input_statistics import bfloat16_products, multiplies_bfloat16

KEPT = torch.bfloat16  # the data type of the kept inputs and matrices
PRECISION = "medium"  # of products in float32
HEAD_CHUNK = 2**11  # vocabulary entries whose logits are computed at a time

_STATES = "states"


def information_steps(layers: int) -> int:
    """Return how often `OutputInformation.measure` calls `on_step`, if nothing is there yet."""
    return 2 * layers + 1


def layer_information(files: InformationFiles, layout: LayerLayout, index: int) -> Mapping[str, list[Tensor]]:
    """Return the matrices [n, n] of layer `index`, by the names of its groups: see `matrix_sizes`."""
    read = files.read(INFORMATION, index, {name: (size, size) for name, size in _matrices(layout)})
    return {g.name: [read[f"{g.name}.{i}"] for i in range(len(matrix_sizes(layout, g)))] for g in layout.groups}


def _matrices(layout: LayerLayout) -> Iterator[tuple[str, int]]:
    """The names in the files and the sizes of a layer's matrices."""
    return ((f"{g.name}.{i}", size) for g in layout.groups for i, size in enumerate(matrix_sizes(layout, g)))


@dataclass(frozen=True)
class OutputInformation:
    """The pass over one model.

    ids: the calibration rows [R, S], some of which it takes; tokens: in a batch; seed: of the labels.
    """

    stack: TextStack
    files: InformationFiles
    ids: Tensor
    tokens: int
    seed: int

    def measure(self, on_step: Callable[[], None]) -> None:
        """Make the file of every layer that has none."""
        files, layers = self.files, self.stack.checkpoint.layers
        # whatever is kept for a gradient must not be an inference tensor
        with torch.inference_mode(False), torch.no_grad(), matmul_precision(PRECISION):
            if not files.there(INFORMATION):
                self._forward(on_step)
                if layers not in files.there(GRADIENT):
                    self._begin_backward()
                on_step()
            first = min(files.there(INFORMATION), default=layers)
            for index in reversed(range(first)):
                self._backward(index)
                files.remove(GRADIENT, index + 1)
                files.remove(INPUT, index + 1)
                return_freed_memory()
                on_step()
            for kind in (INPUT, GRADIENT):
                for index in files.there(kind):
                    files.remove(kind, index)

    @property
    def steps_left(self) -> int:
        """How often `measure` will call `on_step`."""
        done, layers = self.files.there(INFORMATION), self.stack.checkpoint.layers
        if done:
            return min(done)
        return information_steps(layers) - max(self.files.there(INPUT), default=0)

    @property
    def _rows(self) -> Tensor:
        """The token ids [R', S'] of the rows that are taken, evenly spaced among all."""
        return self._whole_rows[:, : measured_rows(*self.ids.shape)[1]]

    @property
    def _whole_rows(self) -> Tensor:
        """The same rows with all their tokens: [R', S]."""
        rows, _ = measured_rows(*self.ids.shape)
        return self.ids[torch.arange(rows) * len(self.ids) // rows]

    def _batches(self) -> Iterator[slice]:
        rows, seq_len = self._rows.shape
        size = max(1, self.tokens // seq_len)
        return (slice(first, min(first + size, rows)) for first in range(0, rows, size))

    def _shapes(self, index: int) -> dict[str, tuple[int, ...]]:
        """The tensors of `input-I` and `gradient-I`: states, and the keys and values that layer I or a later one reads.

        The input has all those that are computed before layer I; the gradient has no others.
        """
        shape, (rows, seq_len) = self.stack.checkpoint.shape, self._rows.shape
        streams = () if shape.altup is None else (shape.altup.streams,)
        found: dict[str, tuple[int, ...]] = {_STATES: (rows, *streams, seq_len, shape.hidden)}
        for source in sorted(shape.kv_sources):
            if source < index:
                layout = shape.layouts[source]
                found[_shared_name(source)] = (2, rows, layout.kv_heads, seq_len, layout.head_dim)
        return found

    def _module(self, index: int) -> nn.Module:
        return self.stack.layer(index, self.stack.read_layer(index))

    def _forward(self, on_step: Callable[[], None]) -> None:
        """Make the inputs of all layers and the last one's output."""
        files, layers, rows = self.files, self.stack.checkpoint.layers, self._rows
        done = max(files.there(INPUT), default=-1)
        if done < 0:
            whole = self._whole_rows
            embed = self.stack.embedder(whole)
            states = torch.cat([embed(row)[..., : rows.shape[1], :].to(KEPT) for row in whole.split(1)])
            files.add(INPUT, 0, {_STATES: states})
            done = 0
        for index in range(done, layers):
            given = files.read(INPUT, index, self._shapes(index))
            made = {name: torch.empty(shape, dtype=KEPT) for name, shape in self._shapes(index + 1).items()}
            made.update((name, given[name]) for name in made.keys() & given.keys() - {_STATES})
            module = self._module(index)
            for batch in self._batches():
                shared = self._shared(index, given, batch)
                states = given[_STATES][batch].to(torch.float32)
                with bfloat16_products(self.stack.device):
                    made[_STATES][batch] = self.stack.run_layer(index, module, states, rows[batch], shared).to("cpu")
                if (name := _shared_name(index)) in made:
                    made[name][:, batch] = torch.stack(shared[index]).to("cpu", KEPT)
            self._require_finite(index, made[_STATES])
            files.add(INPUT, index + 1, made)
            return_freed_memory()
            on_step()

    def _shared(self, index: int, given: Mapping[str, Tensor], batch: slice) -> KeysAndValues:
        """The keys and values that layer `index` reads, of a batch, in float32 on the device."""
        source = self.stack.checkpoint.shape.layouts[index].kv_source
        if source is None:
            return {}
        keys, values = given[_shared_name(source)][:, batch].to(self.stack.device, torch.float32)
        return {source: (keys, values)}

    def _begin_backward(self) -> None:
        """Make the gradient at the last layer's output."""
        stack, layers = self.stack, self.stack.checkpoint.layers
        given = self.files.read(INPUT, layers, self._shapes(layers))[_STATES]
        end, head = stack.head()
        generator = torch.Generator(device=stack.device).manual_seed(self.seed)
        made = {name: torch.zeros(shape) for name, shape in self._shapes(layers).items()}
        for batch in self._batches():
            states = given[batch].to(stack.device, torch.float32).requires_grad_()
            with torch.enable_grad():
                normed = end(states)
            slope = label_gradient(stack, head, normed.detach().flatten(0, 1), generator)
            made[_STATES][batch] = torch.autograd.grad(normed, states, slope.view_as(normed))[0].to("cpu")
        self._require_finite(layers - 1, made[_STATES])
        self.files.add(GRADIENT, layers, made)

    def _backward(self, index: int) -> None:
        """Make the matrices of layer `index`, and the gradient at its input."""
        stack, device = self.stack, self.stack.device
        layout = stack.checkpoint.shape.layouts[index]
        given = self.files.read(INPUT, index, self._shapes(index))
        behind = self.files.read(GRADIENT, index + 1, self._shapes(index + 1))
        made = {name: torch.zeros(shape) for name, shape in self._shapes(index).items()}
        made.update((name, behind[name]) for name in made.keys() - {_STATES})
        module = self._module(index)
        observer = _OutputObserver(layout, module, device)
        for batch in self._batches():
            states = given[_STATES][batch].to(device, torch.float32).requires_grad_()
            shared = {
                source: (keys.contiguous().requires_grad_(), values.contiguous().requires_grad_())
                for source, (keys, values) in self._shared(index, given, batch).items()
            }
            inputs = [states, *(part for both in shared.values() for part in both)]
            with torch.enable_grad(), bfloat16_products(device), ordered_attention(device):
                output = stack.run_layer(index, module, states, self._rows[batch], shared)
            outputs, slopes = [output], [behind[_STATES][batch].to(device)]
            if (name := _shared_name(index)) in behind:
                outputs += shared[index]
                slopes += [part.to(device) for part in behind[name][:, batch]]
            observed = observer.take()
            gradients = torch.autograd.grad(outputs, [*inputs, *observed.values()], slopes)
            del output, outputs
            made[_STATES][batch] = gradients[0].to("cpu")
            for source in layout_source(layout):
                made[_shared_name(source)][:, batch] += torch.stack(gradients[1:3]).to("cpu")
            observer.add(dict(zip(observed, gradients[len(inputs) :], strict=True)))
        self._require_finite(index, made[_STATES])
        del module
        if index:
            self.files.add(GRADIENT, index, made)
        self.files.add(INFORMATION, index, observer.matrices())

    def _require_finite(self, index: int, states: Tensor) -> None:
        if not torch.isfinite(states).all():
            raise GemmaAwqError(
                f"Layer {index + 1}: activations or their gradients are NaN or infinite, although the weights are "
                "finite.",
                "The checkpoint is damaged or its training diverged. Compare its files with the original ones.",
            )


def layout_source(layout: LayerLayout) -> tuple[int, ...]:
    """The layer whose keys and values a layer reads, if there is one."""
    return () if layout.kv_source is None else (layout.kv_source,)


def _shared_name(source: int) -> str:
    return f"shared.{source}"


def label_gradient(stack: TextStack, head: Tensor, normed: Tensor, generator: torch.Generator) -> Tensor:
    """Return a gradient at normed final states [n, hidden] whose mean square is the Fisher information: [n, hidden].

    For two labels that are drawn from the predictions it is the difference of their log probabilities' gradients over
    the root of 2. Its mean square is the same as that of one label's gradient, and what both have in common, the mean
    of the whole head, drops out: that would be a second product as large as the logits.

    head: [V, hidden]; the result is in float32.
    """
    result = torch.empty_like(normed, dtype=torch.float32)
    for states, own in zip(normed.split(LOGITS // HEAD_CHUNK), result.split(LOGITS // HEAD_CHUNK), strict=True):
        labels = draw_labels(head, states.to(product_dtype(stack.device)), stack.softcap, generator)
        rows = head[labels].to(torch.float32)  # [n, 2, hidden]
        if stack.softcap is not None:
            logits = torch.linalg.vecdot(rows, states[:, None].to(torch.float32))
            rows *= 1.0 - torch.tanh(logits / stack.softcap).square_()[..., None]  # the slope of the cap
        own.copy_(rows[:, 1] - rows[:, 0]).mul_(0.5**0.5)
    return result


def draw_labels(head: Tensor, states: Tensor, softcap: float | None, generator: torch.Generator) -> Tensor:
    """Draw two labels of each state [n, hidden] from the softmax of its logits, independently: [n, 2].

    A part of the vocabulary at a time is read, and nothing of it is kept but the label that was drawn so far. A part's
    own label takes its place with the part's share of all weights up to and with it.
    """
    device, count = states.device, states.shape[0]
    labels = torch.zeros(count, 2, dtype=torch.int64, device=device)
    top = torch.full((count, 1), -torch.inf, dtype=states.dtype, device=device)
    total = torch.zeros(count, 1, device=device)  # of the weights exp(logit - top)
    for place, rows in enumerate(head.split(HEAD_CHUNK)):
        weights = soft_cap(states @ rows.to(states.dtype).t(), softcap)
        before, top = top, torch.maximum(top, weights.amax(1, keepdim=True))
        weights.sub_(top).exp_()
        own = weights.sum(1, keepdim=True, dtype=torch.float32)
        total = total * (before - top).exp().to(torch.float32) + own
        state, which = torch.nonzero(
            torch.rand(count, 2, generator=generator, device=device) * total < own, as_tuple=True
        )
        sums = running_sums(weights[state].to(torch.float32))
        points = torch.rand(len(state), 1, generator=generator, device=device) * sums[:, -1:]
        drawn = torch.searchsorted(sums, points)[:, 0].clamp_(max=rows.shape[0] - 1)
        labels[state, which] = place * HEAD_CHUNK + drawn
    return labels


class _OutputObserver:
    """Collects the outputs of a layer's linears, and sums the products of their gradients."""

    def __init__(self, layout: LayerLayout, module: nn.Module, device: torch.device) -> None:
        self._layout = layout
        self._seen: dict[str, Tensor] = {}
        self._sums = {name: torch.zeros(size, size, device=device) for name, size in _matrices(layout)}
        self._tokens, self._dtype = 0, product_dtype(device)
        for name in (name for group in layout.groups for name in group.linears):
            module.get_submodule(name).register_forward_hook(self._keeper(name))

    def _keeper(self, name: str) -> Any:
        def keep(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            self._seen[name] = output

        return keep

    def take(self) -> dict[str, Tensor]:
        """Return the outputs [R, S, N] of the last forward by the linears' names, and forget them."""
        taken, self._seen = self._seen, {}
        return taken

    def add(self, gradients: Mapping[str, Tensor]) -> None:
        """Add the gradients [R, S, N] at the outputs of all linears, without that of the BOS."""
        for group in self._layout.groups:
            stacked = torch.cat([gradients[name][:, 1:].flatten(0, 1) for name in group.linears], dim=-1)
            for place, part in enumerate(stacked.to(self._dtype).split(matrix_sizes(self._layout, group), dim=-1)):
                add_products(self._sums[f"{group.name}.{place}"], part)
        self._tokens += len(stacked)

    def matrices(self) -> dict[str, Tensor]:
        """Return the means [n, n] by their names in the file."""
        for total in self._sums.values():
            mirror(total.div_(self._tokens))
        return {name: total.to("cpu", KEPT) for name, total in self._sums.items()}


def ordered_attention(device: torch.device) -> AbstractContextManager[object]:
    """Let attention compute its gradient in a fixed order: the faster kernels of GPUs add in any."""
    return nullcontext() if device.type == "cpu" else sdpa_kernel(SDPBackend.MATH)


def product_dtype(device: torch.device) -> torch.dtype:
    """Return what matrices are multiplied in, with sums in float32: bfloat16 if the device can."""
    return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
