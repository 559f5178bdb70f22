"""compressed-tensors' pack-quantized layout in 4 bits, as llm-compressor and Google's `-qat-w4a16-ct` files have it.

weight_packed int32 [N, K/8] and, if asymmetric, weight_zero_point int32 [N/8, G], both of integers + 8 in order;
weight_scale [N, G]; weight_shape int64 [2]. Source: compressed-tensors 0.20, `compressors/pack_quantized`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.gemma.layers import Linear
from gemma_awq_cli.models.packed_formats.gptq import ACT_ORDER
from gemma_awq_cli.models.packed_formats.packed_format import PACK, SCALES, WORDS, Expected

if TYPE_CHECKING:
    from gemma_awq_cli.awq.packed_arrays import PackedArrays
    from gemma_awq_cli.system.arrays import Array

_SHAPES = ("I64", "I32")


@dataclass(frozen=True)
class PackQuantized:
    """group_sizes: those that the config's groups state, -1 for one group per output; a linear's scales tell which."""

    group_sizes: tuple[int, ...]

    title = "compressed-tensors' pack-quantized layout"
    marker = ".weight_packed"
    kinds = (".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape", ".weight_g_idx")

    def groups(self, linear: Linear, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """See `PackedFormat`."""
        sizes = [linear.inputs if size == -1 else size for size in self.group_sizes]
        scale = shapes.get(".weight_scale", ())
        stored = linear.inputs // scale[1] if len(scale) == 2 and scale[1] else sizes[0]
        return stored if stored in sizes else sizes[0]

    def expected(self, linear: Linear, group_size: int, there: Mapping[str, Any]) -> dict[str, Expected]:
        """See `PackedFormat`."""
        groups = linear.inputs // group_size
        expected = {
            ".weight_packed": Expected((linear.outputs, linear.inputs // PACK), WORDS),
            ".weight_scale": Expected((linear.outputs, groups), SCALES),
            ".weight_zero_point": Expected((linear.outputs // PACK, groups), WORDS),
            ".weight_shape": Expected((2,), _SHAPES),
            ".weight_g_idx": Expected((linear.inputs,), WORDS),
        }
        optional = (".weight_zero_point", ".weight_shape", ".weight_g_idx")
        return {name: one for name, one in expected.items() if name not in optional or name in there}

    def read(self, name: str, linear: Linear, tensors: "Mapping[str, Array]") -> "PackedArrays":
        """See `PackedFormat`. An error for act-order, and for a stated shape that is another."""
        from gemma_awq_cli.models.packed_formats.unpacking import from_pack_quantized, is_in_order

        order, stated = tensors.get(".weight_g_idx"), tensors.get(".weight_shape")
        if order is not None and not is_in_order(order, tensors[".weight_scale"].shape[1]):
            raise GemmaAwqError(f"{name}.weight_g_idx is not in order.", ACT_ORDER)
        if stated is not None and stated.tolist() != [linear.outputs, linear.inputs]:
            raise GemmaAwqError(
                f"{name}.weight_shape is {stated.tolist()}, but the weight is {[linear.outputs, linear.inputs]}.",
                "The file is damaged: get it again.",
            )
        zero_point = tensors.get(".weight_zero_point")
        return from_pack_quantized(tensors[".weight_packed"], zero_point, tensors[".weight_scale"])
