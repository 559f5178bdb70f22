"""Which format the weights are stored in, and which program wrote them.

Decided by the config's quantization section first, then by the names and dtypes of the tensors and the files' metadata.
Every program leaves marks: GPTQModel `meta.quantizer`, AutoRound `autoround_version`, llm-compressor a recipe.yaml, MLX
the header's `format`.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from gemma_awq_cli.inspection.facts import Identity
from gemma_awq_cli.inspection.stored import StoredTensor
from gemma_awq_cli.models.checkpoints.quantization_config import names_awq

AWQ, GPTQ, COMPRESSED, MLX, BNB = "AWQ", "GPTQ", "compressed-tensors", "MLX", "bitsandbytes"
GOOGLE, MODELOPT, UNDECLARED = "gemma (int2/int4/int8 of Google)", "ModelOpt", "undeclared"
BITS16, BITS32, BITS64 = "16-bit", "32-bit", "64-bit"
GEMM, MARLIN = "gemm", "marlin"
OURS = "gemma-awq"
_AUTOAWQ = {"quant_method", "bits", "group_size", "version", "zero_point", "modules_to_not_convert"}
_ROUNDS = ("auto-round", "auto_round", "intel/auto-round")
_WORD = re.compile(r"[\w.+: /@-]{1,60}")
_PACKED = {".qweight": "AWQ or GPTQ", ".weight_packed": COMPRESSED, ".weight.absmax": BNB}
_BNB_STATE = re.compile(r"\.weight\.quant_state\.bitsandbytes__(\w+)$")


def identify(
    section: Mapping[str, Any] | None,
    config: Mapping[str, Any],
    tensors: Mapping[str, StoredTensor],
    metadata: Mapping[str, str],
    files: Collection[str],
    report: Mapping[str, Any] | None,
) -> Identity:
    """Say how the weights are stored.

    section: the quantization section, with AWQ's keys as transformers spells them; config: config.json; metadata: of
    the headers; files: names of all files; report: this tool's own, if there is one.
    """
    mlx = config.get("quantization")
    if metadata.get("format") == "mlx" or (isinstance(mlx, dict) and "group_size" in mlx):
        return _mlx(mlx if isinstance(mlx, dict) else {}, tensors)
    method = None if section is None else section.get("quant_method")
    if section is None or method is None:
        return _by_names(tensors, files)
    name = str(method).lower()
    if names_awq(section):
        return _awq(section, tensors, report)
    if name == "gptq" or name in _ROUNDS:
        return _gptq(section)
    if name in ("compressed-tensors", "compressed_tensors"):
        return _compressed(section, tensors, files)
    if name == "bitsandbytes":
        return _bitsandbytes(section)
    if name == "gemma":
        return Identity(GOOGLE, maker="Google")
    bits, group_size = _whole(section, "bits", "num_bits"), _whole(section, "group_size")
    return Identity(_word(method) or "unknown", None, _maker(section), bits, group_size)


def _awq(section: Mapping[str, Any], tensors: Mapping[str, StoredTensor], report: Mapping[str, Any] | None) -> Identity:
    maker = _maker(section)
    if report is not None:
        maker = f"{OURS} {_word(report['versions'].get('gemma_awq')) or ''}".strip()
    elif maker is None and section.keys() <= _AUTOAWQ:
        maker = "AutoAWQ, or a tool that writes the same config"
    has_zeros = any(name.endswith(".qzeros") for name in tensors)
    symmetric = section.get("zero_point") is False or section.get("sym") is True or not has_zeros
    variant = _word(section.get("version")) or GEMM
    return Identity(AWQ, variant, maker, _whole(section, "bits"), _whole(section, "group_size"), symmetric)


def _gptq(section: Mapping[str, Any]) -> Identity:
    packing = _word(section.get("packing_format")) or ""
    kind = AWQ if "awq" in packing else GPTQ
    words = [_word(section.get("checkpoint_format")), packing or None]
    words += ["act-order"] if section.get("desc_act") is True else []
    variant = GEMM if kind == AWQ else ", ".join(word for word in words if word) or None
    sym = section.get("sym")
    return Identity(
        kind, variant, _maker(section), _whole(section, "bits"), _whole(section, "group_size"),
        sym if isinstance(sym, bool) else None,
    )  # fmt: skip


def _compressed(section: Mapping[str, Any], tensors: Iterable[str], files: Collection[str]) -> Identity:
    groups = section.get("config_groups")
    parts = list(groups.values()) if isinstance(groups, dict) else []
    schemes = [part["weights"] for part in parts if isinstance(part, dict) and isinstance(part.get("weights"), dict)]
    scheme = schemes[0] if schemes else {}
    maker = "llm-compressor" if "recipe.yaml" in files else COMPRESSED
    if version := _word(section.get("version")):
        maker += f" {version}" if maker == COMPRESSED else f" ({COMPRESSED} {version})"
    symmetric = scheme.get("symmetric")
    if not isinstance(symmetric, bool):
        symmetric = not any(name.endswith(".weight_zero_point") for name in tensors)
    bits, group_size = _whole(scheme, "num_bits"), _whole(scheme, "group_size")
    return Identity(COMPRESSED, _word(section.get("format")), maker, bits, group_size, symmetric)


def _bitsandbytes(section: Mapping[str, Any]) -> Identity:
    four = True in (section.get("load_in_4bit"), section.get("_load_in_4bit"))
    kind = _word(section.get("bnb_4bit_quant_type")) if four else "int8"
    return Identity(BNB, kind, "transformers with bitsandbytes", 4 if four else 8, 64 if four else None, True)


def _mlx(section: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Identity:
    if not section and not any(info.dtype == "U32" for info in tensors.values()):
        return replace(_plain(tensors), maker=MLX)
    mode = _word(section.get("mode")) or "affine"
    return Identity(MLX, mode, "mlx-lm", _whole(section, "bits"), _whole(section, "group_size"), mode != "affine")


def _by_names(tensors: Mapping[str, StoredTensor], files: Collection[str]) -> Identity:
    """What no section names: 16-bit weights, or packed ones whose config is not theirs."""
    for name in tensors:
        if state := _BNB_STATE.search(name):
            return Identity(BNB, state[1][:20], bits=4, symmetric=True)
        for ending, kind in _PACKED.items():
            if name.endswith(ending):
                return Identity(kind, UNDECLARED)
    if "hf_quant_config.json" in files:
        return Identity(MODELOPT, maker="NVIDIA ModelOpt")
    return _plain(tensors)


_PLAIN = {
    "BF16": (BITS16, "bfloat16", 16), "F16": (BITS16, "float16", 16), "F32": (BITS32, "float32", 32),
    "F64": (BITS64, "float64", 64),
}  # fmt: skip


def _plain(tensors: Mapping[str, StoredTensor]) -> Identity:
    held: Counter[str] = Counter()
    for info in tensors.values():
        held[info.dtype] += info.nbytes
    if not held:
        return Identity("unknown", quantized=False)
    dtype = held.most_common(1)[0][0]
    if dtype not in _PLAIN:
        return Identity(dtype, UNDECLARED)
    name, variant, bits = _PLAIN[dtype]
    return Identity(name, variant, bits=bits, quantized=False)


def _maker(section: Mapping[str, Any]) -> str | None:
    meta = section.get("meta")
    quantizer = meta.get("quantizer") if isinstance(meta, dict) else None
    for text in quantizer if isinstance(quantizer, list) else [quantizer]:
        if word := _word(text):
            return word.replace(":", " ")
    if version := _word(section.get("autoround_version")):
        return f"AutoRound {version}"
    if str(section.get("quant_method")).lower() in _ROUNDS:
        return "AutoRound"
    if "static_groups" in section or "model_file_base_name" in section:
        return "AutoGPTQ"
    if "use_exllama" in section or "exllama_config" in section:
        return "Optimum"
    return None


def _word(value: object) -> str | None:
    """A short plain text of a config; None for anything else."""
    return value if isinstance(value, str) and _WORD.fullmatch(value) else None


def _whole(section: Mapping[str, Any], *names: str) -> int | None:
    return next((section[name] for name in names if type(section.get(name)) is int), None)
