"""The fidelity of a model as it runs is that of its weights, if it runs in float32."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gemma_awq_cli.bench import llama_cpp, runtime_fidelity
from gemma_awq_cli.bench.measurements import BenchModel
from gemma_awq_cli.bench.runtime_fidelity import measure_running, running_steps
from gemma_awq_cli.calibration_text.recipes import find_recipe
from gemma_awq_cli.cli.app import main
from gemma_awq_cli.fidelity.comparison import measure
from gemma_awq_cli.fidelity.evaluation_text import cut_windows
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward.torch_decoder import DecoderSession
from gemma_awq_cli.models.forward.torch_weights import read_torch_text
from gemma_awq_cli.models.gemma.architecture import architecture_of
from gemma_awq_cli.models.text.prompter import Prompter
from tests.bench.test_bench import documented

CPU = torch.device("cpu")
Capture = pytest.CaptureFixture[str]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text"])
def test_it_is_that_of_the_weights_in_float32(
    kind: str, artifacts: Callable[[str], Path], checkpoints: Callable[[str], Path], text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(runtime_fidelity, "POSITIONS", 17)
    artifact, reference = Checkpoint(artifacts(kind)), Checkpoint(checkpoints(kind))
    rows = cut_windows(find_recipe(str(text_file)), Prompter(reference.folder), 256, 48, 3).rows
    arch = architecture_of(artifact.text_config, artifact.family)
    weights = read_torch_text(artifact, arch, CPU, torch.float32)
    done: list[int] = []
    session = lambda rows, capacity: DecoderSession(weights, rows, capacity)  # noqa: E731
    found = measure_running(session, reference, rows, CPU, lambda: done.append(1))
    expected = measure(artifact, reference, rows, CPU, lambda: None)
    assert len(done) == running_steps(rows, reference.layers)
    assert torch.allclose(found.log_reference, expected.log_reference, rtol=1e-4, atol=1e-4)
    # these hard models amplify the order of summation at a token or two
    assert (found.kl - expected.kl).abs().median() < 1e-4
    assert found.summary().kl == pytest.approx(expected.summary().kl, rel=2e-2)


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_what_bitsandbytes_runs(artifacts: Callable[[str], Path], capsys: Capture) -> None:
    pytest.importorskip("bitsandbytes", reason='the extra is not installed: pip install ".[bnb]"')
    arguments = ["bench", str(artifacts("gemma")), "--fidelity", "--device", "cpu", "--windows", "1", "--json"]
    capsys.readouterr()
    assert main([*arguments, "--compare", "int8", "--compare", "bf16"]) == 0
    own, int8, bf16 = documented(capsys.readouterr())["models"]
    assert own["fidelity"]["arithmetic"] == "stored weights in float32"
    assert int8["fidelity"]["arithmetic"] == "as it runs"
    assert int8["fidelity"]["text_sha256"] == own["fidelity"]["text_sha256"]
    assert int8["fidelity"]["perplexity_16bit"] == pytest.approx(own["fidelity"]["perplexity_16bit"], rel=1e-5)
    assert own["fidelity"]["kl"] > int8["fidelity"]["kl"] > 0
    assert bf16["fidelity"] is None  # it is what the others are compared with


def test_a_gguf_file_that_cannot_be_measured_is_said(
    artifacts: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    folder, file = artifacts("gemma"), tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setattr(llama_cpp, "find_spec", lambda _: None)
    arguments = ["bench", str(folder), "--fidelity", "--device", "cpu", "--windows", "1", "--json"]
    capsys.readouterr()
    assert main([*arguments, "--compare", str(file), "--compare", "no.gguf"]) == 0
    captured = capsys.readouterr()
    assert 'pip install "llama-cpp-python>=0.3.16"' in captured.err
    assert "There is no file no.gguf" in captured.err
    assert [part["model"] for part in json.loads(captured.out)["left_out"]] == [str(file), "no.gguf"]


def test_a_gguf_file_has_no_quantization_report(artifacts: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = Checkpoint(artifacts("gemma"))
    assert BenchModel("a", "model", "own", checkpoint).report is not None
    assert BenchModel("b", "compare", "gguf", checkpoint, tmp_path / "model.gguf").report is None
    assert BenchModel("vllm", "compare", "vllm", checkpoint).report is None


def test_a_gguf_file_runs_as_sessions(tmp_path: Path) -> None:
    """What llama.cpp itself does not read is an error of ours."""
    pytest.importorskip("llama_cpp", reason='the extra is not installed: pip install ".[llama-cpp]"')
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(llama_cpp.GemmaAwqError, match=r"llama\.cpp cannot read"):
        llama_cpp.LlamaModel(file, 64, 1)
