"""The scripts and the notebook of examples/ on a tiny model: what they make is quantized, answers, can be published."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gemma_awq_cli.cli.app import main
from tests.tiny import make_checkpoint

EXAMPLES = Path(__file__).parent.parent / "examples"
CONVERSATIONS = EXAMPLES / "data" / "conversations.jsonl"
TINY = ["--quality", "fast", "--seq-len", "64", "--num-samples", "4", "--group-size", "32"]
TRAINING = ["--steps", "3", "--batch", "2", "--length", "96"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def instruct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "tiny-it", "gemma3_text", chat=True)


def run(*command: object, **variables: str) -> str:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **variables},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def answers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The artifact in a folder answers, and could be published."""
    capsys.readouterr()
    assert main(["run", "Hello", "-m", str(folder), "--max-new-tokens", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] >= 1
    named = ["--base-model", "google/gemma-3-270m-it", "--license", "gemma"]
    assert main(["push", "you/tuned-AWQ", str(folder), "--dry-run", "--yes", *named]) == 0
    assert "model.safetensors" in capsys.readouterr().out


def beside(base: Path, tuned: Path | None, artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`bench --compare` puts the fine-tune's artifact beside that of the base model, both against what was tuned.

    tuned: its folder; None for the base model with the adapter, which the report names.
    """
    base_artifact = tmp_path / "base-awq"
    assert main(["quantize", str(base), "-o", str(base_artifact), *TINY]) == 0
    capsys.readouterr()
    few = ["--fidelity", "--windows", "1", "--device", "cpu"]
    reference = [] if tuned is None else ["--reference", str(tuned)]
    assert main(["bench", str(artifact), *reference, *few, "--compare", str(base_artifact), "--json"]) == 0
    compared = json.loads(capsys.readouterr().out)["models"]
    assert [model["name"] for model in compared] == [str(artifact), str(base_artifact)]
    kl = [model["fidelity"]["kl"] for model in compared]
    assert kl[0] > 0
    assert kl[1] > 0
    if tuned is not None:  # three steps of an adapter move a random model less than quantizing does
        assert kl[0] < kl[1]


def test_qlora_makes_an_adapter_that_is_quantized_with_its_model(
    instruct: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("peft", "trl", "bitsandbytes"):
        pytest.importorskip(package)
    adapter, artifact = tmp_path / "lora", tmp_path / "awq"
    said = run(
        sys.executable, EXAMPLES / "finetune_qlora.py", instruct, CONVERSATIONS, adapter, "--rank", "4", *TRAINING,
        "--learning-rate", "1e-2",
    )  # fmt: skip
    assert f"Next: gemma-awq quantize {instruct} --adapter {adapter}" in said
    # B begins at zero, so what is not zero was learned
    learned = [tensor for name, tensor in load_file(adapter / "adapter_model.safetensors").items() if "lora_B" in name]
    assert len(learned) == 7 * json.loads((instruct / "config.json").read_text())["num_hidden_layers"]
    assert all(tensor.abs().max() > 0 for tensor in learned)
    assert main(["quantize", str(instruct), "--adapter", str(adapter), "-o", str(artifact), *TINY]) == 0
    answers(artifact, capsys)
    beside(instruct, None, artifact, tmp_path, capsys)


def test_fsdp_makes_a_model_that_is_quantized(
    instruct: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned, artifact = tmp_path / "tuned", tmp_path / "awq"
    training = [EXAMPLES / "finetune_fsdp.py", instruct, CONVERSATIONS, tuned, *TRAINING, "--learning-rate", "1e-2"]
    said = run(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *training)
    assert f"Next: gemma-awq quantize {tuned}" in said
    before, after = load_file(instruct / "model.safetensors"), load_file(tuned / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(after[name].dtype == torch.bfloat16 and after[name].shape == before[name].shape for name in before)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) == len(before)  # each process's parts, of every tensor
    assert main(["quantize", str(tuned), "-o", str(artifact), *TINY]) == 0
    answers(artifact, capsys)
    beside(instruct, tuned, artifact, tmp_path, capsys)


def test_the_notebook(instruct: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("peft", "trl", "ipykernel"):
        pytest.importorskip(package)
    client = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    settings = {
        "MODEL": str(instruct), "STEPS": "2", "WORK": str(tmp_path), "QUANTIZE": " ".join(TINY),
        "BENCH": "--windows 1 --device cpu",
        "PUSH": "--dry-run --base-model google/gemma-3-270m --license gemma", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(EXAMPLES / "finetune_quotes.ipynb", 4)
    assert all(not cell.get("outputs") for cell in notebook.cells)  # nothing of the one who wrote it is in it
    client.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    said = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "Would be pushed to you/gemma-quotes-AWQ" in said
    assert "KL divergence, mean" in said
    assert (tmp_path / "awq" / "quantization_report.json").is_file()
