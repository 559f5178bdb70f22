"""A config's quantization section, in one spelling, wherever its writer put it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.files import CONFIG, CORRECT, read_json, require_inside
from gemma_awq_cli.models.checkpoints.key_layouts import PACKED
from gemma_awq_cli.models.packed_formats.choosing import SECTION

# Where writers stored the section before config.json had it: llm-awq and early AutoAWQ, AutoGPTQ and GPTQModel.
BESIDE = ("quant_config.json", "quantize_config.json")
# Keys of AWQ as AutoAWQ spells them in quant_config.json, and GPTQModel in config.json -> as transformers does.
_SPELLINGS = {"w_bit": "bits", "q_group_size": "group_size", "format": "version"}
_DEFAULTS = {"bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}  # of transformers' AwqConfig


def quantization_of(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The quantization section with AWQ's keys as transformers spells them; None for a 16-bit checkpoint."""
    section = config.get(SECTION)
    if isinstance(own := config.get("quantization"), dict) and "bits" in own:
        return {**own, "quant_method": "mlx"}
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
    return name.endswith(tuple(f".{kind}" for kind in PACKED))


def names_awq(section: Mapping[str, Any]) -> bool:
    return str(section.get("quant_method")).lower() == "awq"


def _beside(folder: Path) -> dict[str, Any] | None:
    for name in BESIDE:
        path = folder / name
        if not path.is_file():
            continue
        require_inside(folder, path)
        found = read_json(path)
        if "quant_method" in found:
            return found
        if "w_bit" in found:
            return {"quant_method": "awq", **found}
        if "desc_act" in found:
            return {"quant_method": "gptq", **found}
    return None
