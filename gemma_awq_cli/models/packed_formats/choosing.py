"""Which layout a config's quantization section names, and what to do with a model in one that is not read."""

from collections.abc import Callable, Mapping
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.packed_formats.autoawq import Gemm, Gemv, GemvFast, Marlin, SymmetricGemm
from gemma_awq_cli.models.packed_formats.compressed_tensors import PackQuantized
from gemma_awq_cli.models.packed_formats.gptq import ACT_ORDER, Gptq
from gemma_awq_cli.models.packed_formats.packed_format import GROUP_MULTIPLE, PackedFormat

SECTION = "quantization_config"
NOT_CONVERTED = "modules_to_not_convert"
ORIGINAL = "Give the original 16-bit checkpoint: `gemma-awq quantize` makes a 4-bit artifact of it."
READ = "4-bit AWQ (gemm, gemv, gemv_fast, marlin), GPTQ and compressed-tensors (pack-quantized)"
# Methods that are known and not read -> what they are, and what runs them.
_OTHERS = {
    "mlx": ("MLX's own 4-bit format", "mlx-lm runs it."),
    "bitsandbytes": (
        "quantized by bitsandbytes",
        "It quantizes while loading: `gemma-awq run -m ORIGINAL --quantization nf4` does that with the 16-bit model.",
    ),
    "gemma": ("Google's mobile format (`quant_method: gemma`, 2, 4 and 8 bits mixed)", "LiteRT-LM runs it."),
    "gguf": ("GGUF", "llama.cpp runs it."),
}
_AWQ_LAYOUTS: dict[str, Callable[[int], PackedFormat]] = {
    "gemm": Gemm, "gemv": Gemv, "gemv_fast": GemvFast, "marlin": Marlin,
}  # fmt: skip
_PRESETS = ("W4A16", "W4A16_ASYM")  # of compressed-tensors: 4 bits in groups of 128
_PRESET_GROUP = 128


def choose_format(section: Mapping[str, Any], where: object) -> PackedFormat:
    """The layout that a section in transformers' spelling names. where: the checkpoint, for errors.

    Raises GemmaAwqError for other kinds of quantization: it says what the model is and what to do.
    """
    method = str(section.get("quant_method")).lower().replace("_", "-")
    if method == "awq":
        return _awq(section, where)
    if method == "gptq":
        return _gptq(section, where)
    if method in ("auto-round", "intel/auto-round"):
        return _auto_round(section, where)
    if method == "compressed-tensors":
        return _compressed_tensors(section, where)
    if method in _OTHERS:
        what, hint = _OTHERS[method]
        raise GemmaAwqError(f"{where} is {what}, which is not read.", f"{hint} {ORIGINAL}")
    raise _unsupported(section, where)


def _awq(section: Mapping[str, Any], where: object) -> PackedFormat:
    _require_four_bits(section.get("bits"), section, where)
    version = section.get("version")
    layout = _AWQ_LAYOUTS.get(version) if isinstance(version, str) else None
    if layout is None:
        raise _unsupported(section, where)
    group_size = _group_size(section.get("group_size"), where)
    if section.get("zero_point") is False and version == "gemm":
        return SymmetricGemm(group_size)
    return layout(group_size)


def _gptq(section: Mapping[str, Any], where: object) -> PackedFormat:
    _require_four_bits(section.get("bits"), section, where)
    layout = section.get("checkpoint_format") or section.get("format") or "gptq"
    if layout not in ("gptq", "gptq_v2"):
        raise _unsupported(section, where)
    group_size = _group_size(section.get("group_size"), where)
    if section.get("desc_act") and group_size != -1:
        raise GemmaAwqError(f"{where} is quantized by GPTQ with act-order (desc_act).", ACT_ORDER)
    return Gptq(group_size, 2 if layout == "gptq_v2" else 1, section.get("sym") is not False)


def _auto_round(section: Mapping[str, Any], where: object) -> PackedFormat:
    _require_four_bits(section.get("bits"), section, where)
    group_size = _group_size(section.get("group_size"), where)
    packing = str(section.get("packing_format"))
    if section.get("data_type") not in (None, "int"):
        raise _unsupported(section, where)
    if packing.endswith("awq"):
        return Gemm(group_size)
    if packing.endswith("gptq"):
        return Gptq(group_size, 1, section.get("sym") is not False)
    raise _unsupported(section, where)


def _compressed_tensors(section: Mapping[str, Any], where: object) -> PackedFormat:
    groups = section.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise _unsupported(section, where)
    sizes = []
    for name, group in groups.items():
        if isinstance(group, list) and name in _PRESETS:
            sizes.append(_PRESET_GROUP)
            continue
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict) or group.get("input_activations") is not None:
            raise _unsupported(section, where)
        layout = group.get("format") or section.get("format")
        if layout != "pack-quantized" or weights.get("type", "int") != "int" or weights.get("dynamic") is True:
            raise _unsupported(section, where)
        _require_four_bits(weights.get("num_bits"), section, where)
        strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "channel")
        if strategy not in ("group", "channel"):
            raise _unsupported(section, where)
        sizes.append(-1 if strategy == "channel" else _group_size(weights.get("group_size"), where))
    return PackQuantized(tuple(dict.fromkeys(sizes)))


def _require_four_bits(bits: object, section: Mapping[str, Any], where: object) -> None:
    if type(bits) is not int or bits != 4:
        raise _unsupported(section, where)


def _group_size(stated: object, where: object) -> int:
    if stated == -1 and type(stated) is int:
        return -1
    if type(stated) is not int or stated <= 0 or stated % GROUP_MULTIPLE:
        raise GemmaAwqError(
            f"{where}: {SECTION} has group_size {str(stated)[:40]}; it must be a multiple of {GROUP_MULTIPLE}, or -1.",
            ORIGINAL,
        )
    return stated


def _unsupported(section: Mapping[str, Any], where: object) -> GemmaAwqError:
    return GemmaAwqError(f"{where} is quantized as {describe(section)}, which is not read; what is: {READ}.", ORIGINAL)


def describe(section: Mapping[str, Any]) -> str:
    """A quantization in a few words: `awq gemv 4-bit`."""
    method = section.get("quant_method")
    if method is None:
        return "an unnamed method"
    is_awq = str(method).lower() == "awq"
    keys = ("version",) if is_awq else ("packing_format", "checkpoint_format", "format")
    details = [next((section[key] for key in keys if section.get(key)), None)]
    bits = section.get("bits")
    words = [str(method), *(str(word) for word in details if isinstance(word, str))]
    return " ".join(word[:40] for word in words) + (f" {bits}-bit" if isinstance(bits, int) else "")
