"""AutoAWQ's four layouts. Sources: AutoAWQ 0.2.9, `awq/modules/linear/{gemm,gemv,gemv_fast,marlin}.py`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.gemma.layers import Linear
from gemma_awq_cli.models.packed_formats.packed_format import PACK, SCALES, WORDS, Expected, declared_group_size

if TYPE_CHECKING:
    from gemma_awq_cli.awq.packed_arrays import PackedArrays
    from gemma_awq_cli.system.arrays import Array

_MARLIN_TILE = 16


@dataclass(frozen=True)
class _AutoAwq:
    """What the four have in common. group_size: as the config states it."""

    group_size: int

    marker = ".qweight"
    kinds = (".qweight", ".qzeros", ".scales", ".workspace")

    def groups(self, linear: Linear, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """See `PackedFormat`."""
        return declared_group_size(self.group_size, linear)


@dataclass(frozen=True)
class Gemm(_AutoAwq):
    """The layout of this project's artifacts. Files without zero points (`zero_point: false`) are symmetric."""

    title = "AutoAWQ's GEMM layout"

    def expected(self, linear: Linear, group_size: int, there: Mapping[str, Any]) -> dict[str, Expected]:
        """See `PackedFormat`."""
        groups, words = linear.inputs // group_size, linear.outputs // PACK
        return {
            ".qweight": Expected((linear.inputs, words), WORDS),
            ".qzeros": Expected((groups, words), WORDS),
            ".scales": Expected((groups, linear.outputs), SCALES),
        }

    def read(self, name: str, linear: Linear, tensors: "Mapping[str, Array]") -> "PackedArrays":
        """See `PackedFormat`."""
        from gemma_awq_cli.awq.packed_arrays import PackedArrays, exact_scales

        return PackedArrays(tensors[".qweight"], tensors[".qzeros"], exact_scales(tensors[".scales"]))


@dataclass(frozen=True)
class SymmetricGemm(Gemm):
    """The GEMM layout without zero points, which stand at 8 then."""

    title = "AutoAWQ's GEMM layout without zero points"

    def expected(self, linear: Linear, group_size: int, there: Mapping[str, Any]) -> dict[str, Expected]:
        """See `PackedFormat`."""
        expected = super().expected(linear, group_size, there)
        return {name: one for name, one in expected.items() if name != ".qzeros" or name in there}

    def read(self, name: str, linear: Linear, tensors: "Mapping[str, Array]") -> "PackedArrays":
        """See `PackedFormat`."""
        from gemma_awq_cli.models.packed_formats.unpacking import without_zeros

        if ".qzeros" in tensors:
            return super().read(name, linear, tensors)
        return without_zeros(tensors[".qweight"], tensors[".scales"])


@dataclass(frozen=True)
class Gemv(_AutoAwq):
    """qweight int32 [N, K/8], packed in order along the inputs; qzeros [N, W] and scales [N, 8 W], both padded."""

    title = "AutoAWQ's GEMV layout"

    def expected(self, linear: Linear, group_size: int, there: Mapping[str, Any]) -> dict[str, Expected]:
        """See `PackedFormat`."""
        words = _padded_words(linear.inputs // group_size, group_size)
        return {
            ".qweight": Expected((linear.outputs, linear.inputs // PACK), WORDS),
            ".qzeros": Expected((linear.outputs, words), WORDS),
            ".scales": Expected((linear.outputs, words * PACK), SCALES),
        }

    def read(self, name: str, linear: Linear, tensors: "Mapping[str, Array]") -> "PackedArrays":
        """See `PackedFormat`."""
        from gemma_awq_cli.models.packed_formats.unpacking import from_gemv

        groups = linear.inputs // declared_group_size(self.group_size, linear)
        return from_gemv(tensors[".qweight"], tensors[".qzeros"], tensors[".scales"], groups)


@dataclass(frozen=True)
class GemvFast(_AutoAwq):
    """qweight int16 [N/4, K], four outputs interleaved; scales and `-scale * zero point` in float16 [padded G, N]."""

    title = "AutoAWQ's GEMV_FAST layout"

    def expected(self, linear: Linear, group_size: int, there: Mapping[str, Any]) -> dict[str, Expected]:
        """See `PackedFormat`."""
        _require_blocks(linear, 64, 4, self.title)
        rows = _padded_words(linear.inputs // group_size, group_size) * PACK
        return {
            ".qweight": Expected((linear.outputs // 4, linear.inputs), ("I16",)),
            ".qzeros": Expected((rows, linear.outputs), SCALES),
            ".scales": Expected((rows, linear.outputs), SCALES),
        }

    def read(self, name: str, linear: Linear, tensors: "Mapping[str, Array]") -> "PackedArrays":
        """See `PackedFormat`."""
        from gemma_awq_cli.models.packed_formats.unpacking import from_gemv_fast

        groups = linear.inputs // declared_group_size(self.group_size, linear)
        return from_gemv_fast(name, tensors[".qweight"], tensors[".qzeros"], tensors[".scales"], groups)


@dataclass(frozen=True)
class Marlin(_AutoAwq):
    """qweight int32 [K/16, 2 N] in tiles of 16 x 16 in the order of the GPU's fragments; scales permuted; symmetric."""

    title = "AutoAWQ's Marlin layout"

    def expected(self, linear: Linear, group_size: int, there: Mapping[str, Any]) -> dict[str, Expected]:
        """See `PackedFormat`."""
        _require_blocks(linear, _MARLIN_TILE, 64, self.title)
        groups = linear.inputs // group_size
        expected = {
            ".qweight": Expected((linear.inputs // _MARLIN_TILE, linear.outputs * 2), WORDS),
            ".scales": Expected((groups, linear.outputs), SCALES),
        }
        if ".workspace" in there:  # scratch memory that some versions saved
            expected[".workspace"] = Expected(tuple(there[".workspace"]), WORDS)
        return expected

    def read(self, name: str, linear: Linear, tensors: "Mapping[str, Array]") -> "PackedArrays":
        """See `PackedFormat`."""
        from gemma_awq_cli.models.packed_formats.unpacking import from_marlin

        return from_marlin(tensors[".qweight"], tensors[".scales"])


def _require_blocks(linear: Linear, inputs: int, outputs: int, title: str) -> None:
    if linear.inputs % inputs or linear.outputs % outputs:
        raise GemmaAwqError(
            f"A linear of {linear.inputs} inputs and {linear.outputs} outputs does not fit {title}.",
            "The config and the weights belong to different models, or the config names another layout than theirs.",
        )


def _padded_words(groups: int, group_size: int) -> int:
    """Words of zero points per output as AutoAWQ pads them (`calculate_zeros_width`)."""
    multiple = 1 if group_size >= 128 else 128 // group_size
    words = -(-groups // PACK)
    return -(-words // multiple) * multiple
