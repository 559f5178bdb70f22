"""Folders of checkpoints as other programs write them: names, dtypes and shapes only, with zeros for weights."""

import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gemma_awq_cli.inspection.stored import ELEMENT_BYTES
from gemma_awq_cli.models.gemma.config_defaults import with_defaults
from gemma_awq_cli.models.gemma.config_values import text_values
from gemma_awq_cli.models.gemma.families import FAMILIES
from gemma_awq_cli.models.gemma.layers import layers_of

Tensors = dict[str, tuple[str, tuple[int, ...]]]  # name -> dtype, shape
GROUP = 32
CONFIG: Mapping[str, Any] = {
    "model_type": "gemma", "architectures": ["GemmaForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 264,
    "max_position_embeddings": 256, "hidden_act": "gelu", "torch_dtype": "float16",
}  # fmt: skip
GEMMA_7B: Mapping[str, Any] = {
    "model_type": "gemma", "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256, "vocab_size": 256000,
    "max_position_embeddings": 8192, "hidden_act": "gelu", "torch_dtype": "float16",
}  # fmt: skip


def write_file(path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file whose data are a hole in the file."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.ceil(math.prod(shape) * ELEMENT_BYTES[dtype])
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)


def model_tensors(config: Mapping[str, Any], pack: Callable[[str, int, int], Tensors] | None = None) -> Tensors:
    """The tensors of a Gemma 1 with the linears that `pack(name, outputs, inputs)` makes, else 16-bit ones."""
    family = FAMILIES[config["model_type"]]
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    tensors: Tensors = {
        "model.embed_tokens.weight": ("F16", (vocabulary, hidden)), "model.norm.weight": ("F16", (hidden,))
    }  # fmt: skip
    values = text_values(config, family, Path("config.json"), config["num_hidden_layers"])
    for index, layout in enumerate(layers_of(with_defaults(values, 0), family)):
        prefix = f"model.layers.{index}."
        tensors |= {f"{prefix}{norm.name}.weight": ("F16", (norm.size,)) for norm in layout.norms.values()}
        for name, linear in layout.linears.items():
            plain: Tensors = {f"{prefix}{name}.weight": ("F16", (linear.outputs, linear.inputs))}
            tensors |= plain if pack is None else pack(f"{prefix}{name}", linear.outputs, linear.inputs)
    return tensors


def write_model(
    folder: Path,
    tensors: Tensors,
    config: Mapping[str, Any] = CONFIG,
    metadata: Mapping[str, str] | None = None,
    **more: Any,
) -> Path:
    """A folder with config.json, one file of weights, and a tokenizer of no use."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config, **more}))
    (folder / "tokenizer.json").write_text("{}")
    write_file(folder / "model.safetensors", tensors, metadata)
    return folder


def awq_gemm(name: str, outputs: int, inputs: int, group: int = GROUP) -> Tensors:
    return {
        f"{name}.qweight": ("I32", (inputs, outputs // 8)),
        f"{name}.qzeros": ("I32", (inputs // group, outputs // 8)),
        f"{name}.scales": ("F16", (inputs // group, outputs)),
    }


def awq_gemm_128(name: str, outputs: int, inputs: int) -> Tensors:
    return awq_gemm(name, outputs, inputs, 128)


def awq_gemv(name: str, outputs: int, inputs: int) -> Tensors:
    return {
        f"{name}.qweight": ("I32", (outputs, inputs // 8)),
        f"{name}.qzeros": ("I32", (outputs, 1)),
        f"{name}.scales": ("F16", (outputs, 8)),
    }


def gptq(name: str, outputs: int, inputs: int) -> Tensors:
    return {
        f"{name}.qweight": ("I32", (inputs // 8, outputs)),
        f"{name}.qzeros": ("I32", (inputs // GROUP, outputs // 8)),
        f"{name}.scales": ("F16", (inputs // GROUP, outputs)),
        f"{name}.g_idx": ("I32", (inputs,)),
    }


def compressed(name: str, outputs: int, inputs: int) -> Tensors:
    return {
        f"{name}.weight_packed": ("I32", (outputs, inputs // 8)),
        f"{name}.weight_scale": ("BF16", (outputs, inputs // GROUP)),
        f"{name}.weight_shape": ("I64", (2,)),
    }


def compressed_asymmetric(name: str, outputs: int, inputs: int) -> Tensors:
    return {
        **compressed(name, outputs, inputs),
        f"{name}.weight_zero_point": ("I32", (outputs // 8, inputs // GROUP)),
    }


def mlx(name: str, outputs: int, inputs: int) -> Tensors:
    return {
        f"{name}.weight": ("U32", (outputs, inputs // 8)),
        f"{name}.scales": ("BF16", (outputs, inputs // GROUP)),
        f"{name}.biases": ("BF16", (outputs, inputs // GROUP)),
    }


def bitsandbytes(name: str, outputs: int, inputs: int) -> Tensors:
    return {
        f"{name}.weight": ("U8", (outputs * inputs // 2, 1)),
        f"{name}.weight.absmax": ("U8", (outputs * inputs // 64,)),
        f"{name}.weight.quant_map": ("F32", (16,)),
        f"{name}.weight.nested_absmax": ("F32", (1,)),
        f"{name}.weight.nested_quant_map": ("F32", (256,)),
        f"{name}.weight.quant_state.bitsandbytes__nf4": ("U8", (80,)),
    }


def gguf(values: Mapping[str, Any], tensors: Mapping[str, tuple[int, tuple[int, ...]]], version: int = 3) -> bytes:
    """A GGUF header. values: integers, texts and lists of texts; tensors: name -> type, shape."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def value(one: Any) -> bytes:
        if isinstance(one, list):
            return struct.pack("<IIQ", 9, 8, len(one)) + b"".join(map(text, one))
        return struct.pack("<I", 8) + text(one) if isinstance(one, str) else struct.pack("<II", 4, one)

    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(values))
    keys = b"".join(text(key) + value(one) for key, one in values.items())
    infos = b"".join(
        text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, 0)
        for name, (kind, shape) in tensors.items()
    )
    return head + keys + infos
