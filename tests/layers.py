"""Something happens as a layer of a quantization begins: an interruption, a full disk, a file that vanishes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

from torch import Tensor

from gemma_awq_cli.models.forward.layerwise import TextStack


@contextmanager
def as_layer_begins(layer: int, do: Callable[[], None]) -> Iterator[None]:
    """`do` is called before the weights of layer `layer` (0, 1, ...) are read to be quantized."""
    read_layer = TextStack.read_layer

    def observed(stack: TextStack, index: int) -> dict[str, Tensor]:
        if index == layer:
            do()
        return read_layer(stack, index)

    with mock.patch.object(TextStack, "read_layer", observed):
        yield
