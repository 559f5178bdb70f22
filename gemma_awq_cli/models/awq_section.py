"""A config's quantization section: whether it speaks of AutoAWQ's 4-bit GEMM layout, and the group size."""

from collections.abc import Mapping
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError

GROUP_MULTIPLE = 8  # no writer of the layout makes smaller groups, and no kernel reads others


def is_awq(section: Mapping[str, Any]) -> bool:
    """Whether the section names the one layout that is read."""
    bits = section.get("bits")
    return section.get("quant_method") == "awq" and _version(section) == "gemm" and type(bits) is int and bits == 4


def awq_group_size(section: Mapping[str, Any], where: object) -> int:
    """The group size; an error for any other kind of quantization. where: the checkpoint, for errors."""
    if not is_awq(section):
        described = " ".join(str(value)[:40] for value in (section.get("quant_method"), _version(section)))
        raise GemmaAwqError(
            f"{where} is quantized as {described} {str(section.get('bits'))[:40]}-bit; only 4-bit AWQ (gemm) is read.",
            "Quantize the original 16-bit checkpoint with `gemma-awq quantize`.",
        )
    group_size = section.get("group_size")
    if type(group_size) is not int or group_size <= 0 or group_size % GROUP_MULTIPLE:
        raise GemmaAwqError(
            f"{where}: quantization_config has group_size {str(group_size)[:40]}; "
            f"it must be a multiple of {GROUP_MULTIPLE}.",
            "Quantize the original 16-bit checkpoint with `gemma-awq quantize`.",
        )
    return group_size


def _version(section: Mapping[str, Any]) -> str:
    return str(section.get("version", "gemm")).lower()
