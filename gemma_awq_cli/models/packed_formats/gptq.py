"""GPTQ's layout, as AutoGPTQ, GPTQModel and AutoRound write it.

qweight int32 [K/8, N], packed in order along the inputs; qzeros int32 [G, N/8], packed in order along the outputs;
scales [G, N]; g_idx int32 [K], the group of each input. Version 1 stores the zero points less 1, version 2 as they are.
Source: GPTQModel 7.7, `nn_modules/qlinear/__init__.py` (pack) and `utils/model.py` (version 1 to 2).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.gemma.layers import Linear
from gemma_awq_cli.models.packed_formats.packed_format import PACK, SCALES, WORDS, Expected, declared_group_size

if TYPE_CHECKING:
    from gemma_awq_cli.awq.packed_arrays import PackedArrays
    from gemma_awq_cli.system.arrays import Array

ACT_ORDER = (
    "Its groups hold inputs in order of activation (act-order), which no layout of consecutive groups can store. Give "
    "a version made with desc_act false, or the original 16-bit checkpoint."
)


@dataclass(frozen=True)
class Gptq:
    """group_size: as the config states it; version: 1 or 2; symmetric: whether zero points may be missing."""

    group_size: int
    version: int
    symmetric: bool

    marker = ".qweight"
    kinds = (".qweight", ".qzeros", ".scales", ".g_idx")

    @property
    def title(self) -> str:
        """The layout's name, for users."""
        return f"GPTQ's layout, version {self.version}"

    def groups(self, linear: Linear, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """See `PackedFormat`."""
        return declared_group_size(self.group_size, linear)

    def expected(self, linear: Linear, group_size: int, there: Mapping[str, Any]) -> dict[str, Expected]:
        """See `PackedFormat`."""
        groups = linear.inputs // group_size
        expected = {
            ".qweight": Expected((linear.inputs // PACK, linear.outputs), WORDS),
            ".qzeros": Expected((groups, linear.outputs // PACK), WORDS),
            ".scales": Expected((groups, linear.outputs), SCALES),
            ".g_idx": Expected((linear.inputs,), WORDS),
        }
        optional = {".g_idx"} | ({".qzeros"} if self.symmetric else set())
        return {name: one for name, one in expected.items() if name not in optional or name in there}

    def read(self, name: str, linear: Linear, tensors: "Mapping[str, Array]") -> "PackedArrays":
        """See `PackedFormat`. An error for act-order."""
        from gemma_awq_cli.models.packed_formats.unpacking import from_gptq, is_in_order

        order = tensors.get(".g_idx")
        if order is not None and not is_in_order(order, tensors[".scales"].shape[0]):
            raise GemmaAwqError(f"{name}.g_idx is not in order.", ACT_ORDER)
        return from_gptq(tensors[".qweight"], tensors.get(".qzeros"), tensors[".scales"], self.version)
