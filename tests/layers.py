"""Something happens as a layer of a quantization begins: an interruption, a full disk, a file that vanishes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

from torch import Tensor

from gemma_awq_cli.models.forward.layerwise import TextStack
from gemma_awq_cli.quantize import layer_pass
from gemma_awq_cli.quantize.plan import Plan


@contextmanager
def as_layer_begins(layer: int, do: Callable[[], None]) -> Iterator[None]:
    """`do` is called before the weights of layer `layer` (0, 1, ...) are read to be quantized."""
    read = layer_pass._read

    def observed(stack: TextStack, plan: Plan, index: int) -> dict[str, Tensor]:
        if index == layer:
            do()
        return read(stack, plan, index)

    with mock.patch.object(layer_pass, "_read", observed):
        yield


def interrupt() -> None:
    """What Ctrl-C does."""
    raise KeyboardInterrupt
