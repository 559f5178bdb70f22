"""Every format is named for what it is, with who made it, whatever else is wrong with the folder."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from gemma_awq_cli.inspection.contents import local_contents
from gemma_awq_cli.inspection.facts import Identity, ModelFacts
from gemma_awq_cli.inspection.model import inspect_contents
from tests.inspection import folders
from tests.inspection.folders import Tensors, model_tensors, write_model

AWQ_SECTION = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
GPTQ_SECTION = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}


def scheme(symmetric: bool) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "group_size": 32, "strategy": "group", "symmetric": symmetric}
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "version": "0.12.2", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"weights": weights, "targets": ["Linear"], "input_activations": None}},
    }  # fmt: skip


@dataclass(frozen=True)
class Format:
    """How a program writes a folder, and what must be said of it."""

    says: Identity
    section: Mapping[str, Any] | None
    pack: Callable[[str, int, int], Tensors] | None = None
    metadata: Mapping[str, str] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    extra: Tensors = field(default_factory=dict)


LIKE_AUTOAWQ = "AutoAWQ, or a tool that writes the same config"
FORMATS = {
    "16-bit": Format(Identity("16-bit", "float16", None, 16, quantized=False), None),
    "16-bit of quantization-aware training": Format(
        Identity("16-bit", "float16", None, 16, quantized=False), {"weights": {"bits": 4}}
    ),
    "AutoAWQ": Format(
        Identity("AWQ", "gemm", LIKE_AUTOAWQ, 4, 32, False), {**AWQ_SECTION, "version": "GEMM"}, folders.awq_gemm
    ),
    "AutoAWQ beside config.json": Format(
        Identity("AWQ", "gemm", LIKE_AUTOAWQ, 4, 32, False), None, folders.awq_gemm,
        files={"quant_config.json": '{"zero_point": true, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}'},
    ),
    "AutoAWQ gemv": Format(
        Identity("AWQ", "gemv", LIKE_AUTOAWQ, 4, 32, False), {**AWQ_SECTION, "version": "gemv"}, folders.awq_gemv
    ),
    "GPTQModel's AWQ": Format(
        Identity("AWQ", "gemm", "gptqmodel 7.7.0", 4, 32, False),
        {"quant_method": "awq", "bits": 4, "group_size": 32, "format": "gemm", "zero_point": True,
         "meta": {"quantizer": ["gptqmodel:7.7.0"]}},
        folders.awq_gemm,
    ),
    "AutoRound's AWQ": Format(
        Identity("AWQ", "gemm", "AutoRound 0.9.1", 4, 32, True),
        {**AWQ_SECTION, "autoround_version": "0.9.1", "sym": True, "packing_format": "auto_round:auto_awq"},
        folders.awq_gemm,
    ),
    "AutoRound": Format(
        Identity("GPTQ", "auto_round:auto_gptq", "AutoRound 0.9.1", 4, 32, True),
        {**GPTQ_SECTION, "quant_method": "auto-round", "autoround_version": "0.9.1",
         "packing_format": "auto_round:auto_gptq"},
        folders.gptq,
    ),
    "GPTQModel": Format(
        Identity("GPTQ", "gptq", "gptqmodel 7.7.0", 4, 32, True),
        {**GPTQ_SECTION, "checkpoint_format": "gptq", "meta": {"quantizer": ["gptqmodel:7.7.0"]}}, folders.gptq,
    ),
    "GPTQ with act-order": Format(
        Identity("GPTQ", "act-order", "AutoGPTQ", 4, 32, False),
        {**GPTQ_SECTION, "sym": False, "desc_act": True, "static_groups": False}, folders.gptq,
    ),
    "llm-compressor": Format(
        Identity("compressed-tensors", "pack-quantized", "llm-compressor (compressed-tensors 0.12.2)", 4, 32, True),
        scheme(True), folders.compressed, files={"recipe.yaml": ""},
    ),
    "compressed-tensors with zero points": Format(
        Identity("compressed-tensors", "pack-quantized", "compressed-tensors 0.12.2", 4, 32, False), scheme(False),
        folders.compressed_asymmetric,
    ),
    "MLX": Format(
        Identity("MLX", "affine", "mlx-lm", 4, 32, False), None, folders.mlx, {"format": "mlx"},
        {"quantization": {"group_size": 32, "bits": 4}},
        extra=folders.mlx("model.embed_tokens", 264, 64),
    ),
    "bitsandbytes": Format(
        Identity("bitsandbytes", "nf4", "transformers with bitsandbytes", 4, 64, True),
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, folders.bitsandbytes,
    ),
    "Google's mobile files": Format(
        Identity("gemma (int2/int4/int8 of Google)", None, "Google"), {"quant_method": "gemma"},
        lambda name, outputs, inputs: {f"{name}.weight": ("I8", (outputs, inputs))},
    ),
    "torchao": Format(Identity("torchao"), {"quant_method": "torchao"}),
}  # fmt: skip


def inspect(folder: Path) -> ModelFacts:
    return inspect_contents(local_contents(folder, str(folder)))


def make(folder: Path, form: Format) -> ModelFacts:
    section = {} if form.section is None else {"quantization_config": form.section}
    tensors = model_tensors(folders.CONFIG, form.pack) | form.extra
    write_model(folder, tensors, metadata=form.metadata, **form.config, **section)
    for name, text in form.files.items():
        (folder / name).write_text(text)
    return inspect(folder)


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_named_for_what_it_is(name: str, tmp_path: Path) -> None:
    form = FORMATS[name]
    facts = make(tmp_path, form)
    assert facts.identity == form.says
    assert facts.missing is not None
    assert facts.missing.count == 0, facts.missing
    assert facts.unread is not None
    assert facts.unread.count == 0, facts.unread
    assert facts.linears is not None
    assert facts.linears.packed == (0 if form.pack is None else 14)
    assert facts.linears.bits16.count == (0 if form.pack else 7)
    assert facts.storage is not None
    assert facts.storage.parameters == 16896 + 64 + 2 * (64 * 2 + 64 * 128 * 2 + 64 * 32 * 2 + 3 * 64 * 96)
    assert json.loads(json.dumps(facts.document()))["identity"]["format"] == form.says.format


def reads(facts: ModelFacts) -> dict[str, str]:
    return {one.reader: one.reads for one in facts.readers}


def test_readers_of_formats(tmp_path: Path) -> None:
    found = {name: reads(make(tmp_path / name, form)) for name, form in FORMATS.items()}
    assert found["AutoAWQ"]["transformers"] == found["AutoAWQ"]["vLLM"] == found["AutoAWQ"]["gemma-awq"] == "yes"
    assert found["AutoAWQ gemv"]["vLLM"] == "no"
    assert found["MLX"] == {**dict.fromkeys(found["MLX"], "no"), "mlx-lm": "yes"}
    assert set(found["Google's mobile files"].values()) == {"no"}
    assert all(one["llama.cpp"] == "no" for one in found.values())
    assert found["bitsandbytes"]["transformers"] == "yes"
    assert found["llm-compressor"]["vLLM"] == "yes"


def test_the_founding_file(tmp_path: Path) -> None:
    """gemma-7b as AutoAWQ wrote it: the head of a tied model stored a second time."""
    tensors = model_tensors(folders.GEMMA_7B, folders.awq_gemm_128)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    section = {**AWQ_SECTION, "group_size": 128}
    facts = inspect(write_model(tmp_path, tensors, folders.GEMMA_7B, quantization_config=section))
    assert facts.storage is not None
    assert facts.head is not None
    assert f"{facts.storage.elements / 1e9:.2f} {facts.storage.bytes / 1e9:.2f}" == "2.61 7.17"
    assert facts.head.tied
    assert facts.head.doubled_bytes == 256000 * 3072 * 2
    assert facts.storage.parameters == 8537680896  # Google's number
    (problem,) = facts.problems
    assert "stored a second time (1.57 GB)" in problem.message
    assert (facts.storage.bytes - facts.head.doubled_bytes) / 1e9 == pytest.approx(5.60, abs=0.005)


def test_linears_that_stay_in_16_bits_are_named(tmp_path: Path) -> None:
    def mixed(name: str, outputs: int, inputs: int) -> Tensors:
        plain: Tensors = {f"{name}.weight": ("F16", (outputs, inputs))}
        return plain if "down_proj" in name else folders.awq_gemm(name, outputs, inputs)

    tensors = model_tensors(folders.CONFIG, mixed)
    section = {**AWQ_SECTION, "modules_to_not_convert": ["down_proj"]}
    facts = inspect(write_model(tmp_path / "told", tensors, quantization_config=section))
    assert facts.linears is not None
    assert facts.linears.bits16.first == ("mlp.down_proj (2 layers)",)
    assert not facts.problems
    facts = inspect(write_model(tmp_path / "untold", tensors, quantization_config=AWQ_SECTION))
    assert [one.message.partition(" is wrong")[0] for one in facts.problems] == [
        "modules_to_not_convert, as transformers reads it,",
        "modules_to_not_convert, as vLLM and SGLang reads it,",
    ]
    assert reads(facts)["transformers"] == reads(facts)["vLLM"] == "no"


def test_a_packed_linear_that_lacks_a_tensor(tmp_path: Path) -> None:
    tensors = model_tensors(folders.CONFIG, folders.awq_gemm)
    del tensors["model.layers.1.mlp.up_proj.scales"]
    facts = inspect(write_model(tmp_path, tensors, quantization_config=AWQ_SECTION))
    assert facts.missing is not None
    assert facts.missing.first == ("model.layers.1.mlp.up_proj.scales",)
    assert reads(facts)["gemma-awq"] == "no"


def test_packed_weights_without_a_section(tmp_path: Path) -> None:
    facts = inspect(write_model(tmp_path, model_tensors(folders.CONFIG, folders.awq_gemm)))
    assert facts.identity is not None
    assert (facts.identity.format, facts.identity.variant) == ("AWQ or GPTQ", "undeclared")
    assert any("has no quantization_config" in one.message for one in facts.problems)


def test_a_declared_dtype_that_the_weights_do_not_have(tmp_path: Path) -> None:
    facts = inspect(write_model(tmp_path, model_tensors(folders.CONFIG), torch_dtype="bfloat16"))
    (problem,) = facts.problems
    assert problem.message == (
        "config.json declares bfloat16, but most weights that are not packed are stored as float16."
    )


def test_a_quantized_head(tmp_path: Path) -> None:
    tensors = model_tensors(folders.CONFIG, folders.awq_gemm) | folders.awq_gemm("lm_head", 264, 64)
    facts = inspect(write_model(tmp_path, tensors, quantization_config=AWQ_SECTION, tie_word_embeddings=False))
    assert facts.head is not None
    assert (facts.head.tied, facts.head.stored, facts.head.packed) == (False, True, True)
    assert facts.unread is not None
    assert not facts.unread.count
