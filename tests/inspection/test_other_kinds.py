"""What is no checkpoint: adapters, GGUF files, pickles."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.inspection.contents import local_contents
from gemma_awq_cli.inspection.facts import Adapter, ModelFacts
from gemma_awq_cli.inspection.gguf_header import read_gguf_header
from gemma_awq_cli.inspection.model import find_contents, inspect_contents
from gemma_awq_cli.inspection.other_kinds import type_in_name
from tests.inspection.folders import gguf, write_file

VALUES: dict[str, Any] = {
    "general.architecture": "gemma3", "general.name": "Gemma 3 tiny", "gemma3.block_count": 18,
    "gemma3.context_length": 32768, "tokenizer.ggml.tokens": [f"<{i}>" for i in range(5000)], "general.file_type": 15,
}  # fmt: skip
TENSORS = {"token_embd.weight": (14, (640, 5000)), "a.weight": (12, (640, 640)), "b.weight": (12, (640, 640))}


def inspect(path: Path) -> ModelFacts:
    return inspect_contents(find_contents(str(path), None, print))


def test_an_adapter(tmp_path: Path) -> None:
    config = {
        "peft_type": "LORA", "base_model_name_or_path": "google/gemma-3-1b-it", "r": 16, "lora_alpha": 32,
        "target_modules": ["v_proj", "q_proj"],
    }  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    write_file(tmp_path / "adapter_model.safetensors", {"x.lora_A.weight": ("F32", (16, 64))})
    facts = inspect(tmp_path)
    assert facts.kind == "adapter"
    assert facts.adapter == Adapter("google/gemma-3-1b-it", "LORA", 16, 32.0, ("q_proj", "v_proj"))
    assert facts.storage is not None
    assert facts.storage.elements == 1024
    assert "not a whole model" in facts.problems[-1].message
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({**config, "use_dora": True, "r": "x", "lora_alpha": 1e300})
    )
    facts = inspect(tmp_path)
    assert facts.adapter is not None
    assert (facts.adapter.kind, facts.adapter.rank, facts.adapter.alpha) == ("DoRA", None, None)
    (tmp_path / "adapter_config.json").write_text("{")
    assert "not valid JSON" in inspect(tmp_path).problems[0].message


@pytest.mark.parametrize("as_file", [True, False], ids=["file", "folder"])
def test_a_gguf(as_file: bool, tmp_path: Path) -> None:
    path = tmp_path / "gemma-3-tiny-Q4_K_M.gguf"
    path.write_bytes(gguf(VALUES, TENSORS))
    facts = inspect(path if as_file else tmp_path)
    (file,) = facts.gguf
    assert facts.kind == "gguf"
    assert (file.architecture, file.title, file.file_type) == ("gemma3", "Gemma 3 tiny", "Q4_K_M")
    assert (file.layers, file.context, file.elements) == (18, 32768, 640 * 5000 + 2 * 640 * 640)
    assert file.types == {"Q4_K": 2, "Q6_K": 1}
    assert [(one.reader, one.reads) for one in facts.readers] == [("llama.cpp", "yes")]


def test_a_header_up_to_the_tokenizer() -> None:
    data = gguf(VALUES, TENSORS)
    asked = []

    def read(start: int, count: int) -> bytes:
        asked.append((start, count))
        return data[start : start + count]

    header = read_gguf_header(read, len(data), "x.gguf", whole=False)
    assert header.values == dict(list(VALUES.items())[:4])
    assert len(asked) == 1
    assert header.elements is None


def test_it_agrees_with_the_library(tmp_path: Path) -> None:
    gguf_library = pytest.importorskip("gguf")
    path = tmp_path / "x.gguf"
    writer = gguf_library.GGUFWriter(path, "gemma2")
    writer.add_name("A name")
    writer.add_context_length(8192)
    writer.add_block_count(26)
    writer.add_file_type(7)
    writer.add_float32("gemma2.final_logit_softcapping", 30.0)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_token_list(["a", "b"])
    writer.add_token_scores([0.0, 1.0])
    import numpy as np

    for name, dtype in (("a", np.float32), ("b", np.float16), ("c", np.float16)):
        writer.add_tensor(name, np.zeros((4, 32), dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (file,) = inspect(path).gguf
    assert (file.architecture, file.title, file.file_type) == ("gemma2", "A name", "Q8_0")
    assert (file.context, file.layers, file.elements, file.types) == (8192, 26, 384, {"F16": 2, "F32": 1})
    theirs = {kind.value: kind.name for kind in gguf_library.GGMLQuantizationType}
    from gemma_awq_cli.inspection.gguf_header import FILE_TYPES, TENSOR_TYPES

    assert all(theirs[number] == name for number, name in TENSOR_TYPES.items())
    types = {kind.value: kind.name.removeprefix("MOSTLY_").removeprefix("ALL_") for kind in gguf_library.LlamaFileType}
    assert all(types[number] == name for number, name in FILE_TYPES.items())


def test_a_damaged_gguf_is_named_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "gemma-q5_0.gguf").write_bytes(gguf(VALUES, TENSORS)[:5000])
    facts = inspect(tmp_path)
    assert facts.gguf[0].file_type == "Q5_0"
    assert "damaged or cut off" in facts.problems[0].message


@pytest.mark.parametrize(
    ("name", "kind"),
    [("gemma-3-1b-it-Q4_K_M.gguf", "Q4_K_M"), ("m.IQ4_XS.gguf", "IQ4_XS"), ("gemma-2b.gguf", None),
     ("x-bf16.gguf", "BF16"), ("Q8_0.gguf", "Q8_0")],
)  # fmt: skip
def test_the_type_in_a_name(name: str, kind: str | None) -> None:
    assert type_in_name(name) == kind


WHOLE = gguf(VALUES, TENSORS)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 400), st.binary(min_size=1, max_size=12))
def test_any_bytes_end_in_an_answer_or_an_error(at: int, planted: bytes) -> None:
    data = WHOLE[:at] + planted + WHOLE[at + len(planted) :]
    with suppress(GemmaAwqError):
        read_gguf_header(lambda start, count: data[start : start + count], len(data), "x.gguf", whole=True)


def test_pickles(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    facts = inspect_contents(local_contents(tmp_path, str(tmp_path)))
    assert facts.kind == "pickle"
    assert "runs code when it is loaded" in facts.problems[0].message
