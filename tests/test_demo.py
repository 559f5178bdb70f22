"""The main job on the real Gemma 3 270M: small (few rows), but the whole way from the package to a completion."""

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from gemma_awq_cli.cli.app import main
from gemma_awq_cli.models.checkpoints import demo
from tests.conftest import make_cache
from tests.models.text.test_tokenizer import require_same

pytestmark = [
    pytest.mark.demo,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec(demo.PACKAGE) is None, reason="the demo package is not installed"),
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, native_folder: Path) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("demo")
    make_cache(folder / "cache", native_folder)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def _own_cache(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMMA_AWQ_CACHE", str(workplace / "cache"))


def test_the_demo_is_quantized_faithfully_and_answers(
    workplace: Path, capsys: pytest.CaptureFixture[str], thorough: bool
) -> None:
    out, quality = workplace / "out", "balanced" if thorough else "fast"
    small = ["--num-samples", "8", "--seq-len", "256", "--device", "cpu"]
    asked = ["quantize", "demo", "-o", str(out), "--quality", quality, *small]
    assert main(asked) == 0
    assert capsys.readouterr().out == f"{out}\n"
    report = json.loads((out / "quantization_report.json").read_text())
    # round-to-nearest has a KL divergence of 0.5 and more on such text
    assert report["fidelity"]["kl"] < 0.25
    assert report["fidelity"]["top1_agreement"] > 0.7
    assert all(group["error"] <= group["rtn_error"] for layer in report["layers"] for group in layer)
    assert main(["run", "The capital of France is", "--max-new-tokens", "8", "--device", "cpu", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["prompt_tokens"] == 6
    assert "city" in answer["text"] or "Paris" in answer["text"] or "capital" in answer["text"]


def test_the_real_tokenizer_is_transformers(workplace: Path) -> None:
    require_same(demo.demo_checkpoint(lambda _: None))


def test_a_damaged_demo_checkpoint_is_made_again(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    folder = demo.demo_checkpoint(notes.append)
    assert not notes, "it was made by the test before"
    sound = shutil.copytree(folder, workplace / "sound")
    # converting again takes most of a minute, and gave these files
    monkeypatch.setattr(demo, "convert", lambda _, staging: shutil.copytree(sound, staging, dirs_exist_ok=True))
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(400_000_000)
        byte = file.read(1)
        file.seek(400_000_000)
        file.write(bytes([byte[0] ^ 1]))
    demo.demo_checkpoint(notes.append)
    assert "damaged" in notes[0]
    with (folder / "model.safetensors").open("rb") as file:
        file.seek(400_000_000)
        assert file.read(1) == byte
    shutil.rmtree(sound)


@pytest.mark.thorough
def test_transformers_reads_the_same_weights_from_the_package(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint against transformers' own dequantization of the same file."""
    import gguf
    import torch
    from safetensors import safe_open
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    package = importlib.import_module(demo.PACKAGE)
    gguf_file = package.assemble(workplace / "demo.gguf")
    folder = demo.demo_checkpoint(lambda _: None)
    from transformers import AutoConfig, AutoModelForCausalLM

    monkeypatch.setattr(gguf, "GGUFReader", demo.gguf_reader())  # which takes a third of the time
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    theirs = load_gguf_checkpoint(str(gguf_file), return_tensors=True, model_to_load=model)["tensors"]
    with safe_open(folder / "model.safetensors", "pt") as ours:
        assert set(ours.keys()) == set(theirs)
        for name in ours.keys():  # noqa: SIM118 (a safe_open handle is no mapping)
            assert torch.equal(ours.get_tensor(name), theirs.pop(name).to(torch.bfloat16)), name
