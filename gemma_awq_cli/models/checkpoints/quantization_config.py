"""A config's quantization section, in one spelling, and a description of kinds that are not supported."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.files import CONFIG, CORRECT, read_json, require_inside

SECTION = "quantization_config"
GROUP_MULTIPLE = 8  # no writer of the layout makes smaller groups, and no kernel reads others
QUANT_CONFIG = "quant_config.json"  # where llm-awq and early AutoAWQ stored the section
# Keys of AWQ as AutoAWQ spells them in quant_config.json, and GPTQModel in config.json -> as transformers does.
_SPELLINGS = {"w_bit": "bits", "q_group_size": "group_size", "format": "version"}
_DEFAULTS = {"bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}  # of transformers' AwqConfig
_PACKED = (".qweight", ".weight_packed")  # AWQ and GPTQ, compressed-tensors
ORIGINAL = "Give the original 16-bit checkpoint: `gemma-awq quantize` makes a 4-bit artifact of it."


def quantization_of(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The quantization section with AWQ's keys as transformers spells them; None for a 16-bit checkpoint."""
    section = config.get(SECTION)
    if section is None:
        section = _beside(folder)
    if section is None:
        return None
    if not isinstance(section, dict):
        raise GemmaAwqError(f"{folder / CONFIG}: {SECTION} is not a JSON object.", CORRECT)
    if not names_awq(section):
        return section
    said = {key: value for key, value in section.items() if value is not None}
    aliases = {ours: said.pop(theirs) for theirs, ours in _SPELLINGS.items() if theirs in said}
    found: dict[str, Any] = {**_DEFAULTS, **aliases, **said, "quant_method": "awq"}
    if section.get("backend") == "llm-awq":  # transformers' name for another packing
        found["version"] = "llm-awq"
    found["version"] = str(found["version"]).lower()
    return found


def names_no_method(section: Mapping[str, Any]) -> bool:
    """Whether the section says nothing about how weights are stored.

    Checkpoints of quantization-aware training have such a section beside 16-bit weights: it describes the training.
    """
    return section.get("quant_method") is None


def is_packed(name: str) -> bool:
    """Whether a tensor's name is one that writers of packed weights use."""
    return name.endswith(_PACKED)


def names_awq(section: Mapping[str, Any]) -> bool:
    return str(section.get("quant_method")).lower() == "awq"


def is_awq(section: Mapping[str, Any]) -> bool:
    """Whether the section names the one supported layout: AutoAWQ's 4-bit GEMM."""
    bits = section.get("bits")
    return names_awq(section) and section.get("version") == "gemm" and type(bits) is int and bits == 4


def awq_group_size(section: Mapping[str, Any], where: object) -> int:
    """The group size; an error for any other kind of quantization. where: the checkpoint, for errors."""
    if not is_awq(section):
        raise GemmaAwqError(
            f"{where} is quantized as {describe(section)}; only 4-bit AWQ (gemm) is supported.", ORIGINAL
        )
    group_size = section.get("group_size")
    if type(group_size) is not int or group_size <= 0 or group_size % GROUP_MULTIPLE:
        raise GemmaAwqError(
            f"{where}: {SECTION} has group_size {str(group_size)[:40]}; it must be a multiple of {GROUP_MULTIPLE}.",
            ORIGINAL,
        )
    return group_size


def _beside(folder: Path) -> dict[str, Any] | None:
    path = folder / QUANT_CONFIG
    if not path.is_file():
        return None
    require_inside(folder, path)
    found = read_json(path)
    return {"quant_method": "awq", **found} if "w_bit" in found or "quant_method" in found else None


def describe(section: Mapping[str, Any]) -> str:
    """A quantization in a few words: `awq gemv 4-bit`."""
    method = section.get("quant_method")
    if method is None:
        return "an unnamed method"
    details = [section.get("version") if names_awq(section) else section.get("format")]
    bits = section.get("bits")
    words = [str(method), *(str(word) for word in details if isinstance(word, str))]
    return " ".join(word[:40] for word in words) + (f" {bits}-bit" if isinstance(bits, int) else "")
