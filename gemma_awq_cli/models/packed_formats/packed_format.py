"""What a layout of packed linears answers, and the helpers that several layouts share.

A layout is chosen once, from a config's quantization section (`choosing.py`). It knows which tensors of a linear it
stores and how to bring them to AutoAWQ's GEMM layout (`awq/packing.py`); it opens no files. numpy is imported
only to read weights (`unpacking.py`): what a model is can be said without it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.gemma.layers import Linear

if TYPE_CHECKING:
    from gemma_awq_cli.awq.packed_arrays import PackedArrays
    from gemma_awq_cli.system.arrays import Array

# dtypes by their names in safetensors' headers
FLOATS = ("BF16", "F16", "F32", "F64")  # of a weight that is not packed
WORDS = ("I32",)  # of packed weights: eight 4-bit integers in each
SCALES = ("F16", "BF16", "F32")
PACK = 8  # 4-bit integers in a word
GROUP_MULTIPLE = 8  # no writer makes smaller groups, and no kernel reads others


@dataclass(frozen=True)
class Expected:
    """The shape of a tensor, and the dtypes that it may have, by their names in safetensors' headers."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = FLOATS


class PackedFormat(Protocol):
    """A layout of packed linears. Tensors of a linear are named by what follows its own name (`.qweight`).

    title: the layout's name, for users; marker: the tensor that each packed linear has; kinds: all that one can have.
    """

    @property
    def title(self) -> str: ...

    @property
    def marker(self) -> str: ...

    @property
    def kinds(self) -> tuple[str, ...]: ...

    def groups(self, linear: Linear, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Inputs per group of a linear. shapes: of the tensors that are there. Not yet checked against anything."""
        ...

    def expected(self, linear: Linear, group_size: int, there: Mapping[str, Any]) -> dict[str, Expected]:
        """The tensors of a linear: those that it must have, and optional ones that are `there`."""
        ...

    def read(self, name: str, linear: Linear, tensors: Mapping[str, "Array"]) -> "PackedArrays":
        """A linear in AutoAWQ's GEMM layout, from tensors that are as `expected`; an error if values are unsound."""
        ...


def declared_group_size(stated: object, linear: Linear) -> int:
    """A config's group size for one linear: -1 (and null) is one group per output."""
    return linear.inputs if stated in (-1, None) else stated  # type: ignore[return-value]


def require_fits(name: str, linear: Linear, group_size: int, title: str, hint: str) -> None:
    """An error unless the sizes of a linear fit whole groups and words."""
    if linear.inputs % group_size or linear.outputs % PACK:
        raise GemmaAwqError(
            f"{name} has {linear.inputs} inputs and {linear.outputs} outputs, which {title} cannot hold in groups of "
            f"{group_size} and words of {PACK}.",
            hint,
        )
