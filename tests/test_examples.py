"""The commands of docs/fine-tuning.md as they are written, with a tiny model and few steps, and the notebook."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from safetensors.torch import load_file

from gemma_awq_cli.cli.app import main
from tests.tiny import make_checkpoint

ROOT = Path(__file__).parent.parent
EXAMPLES, PAGE = ROOT / "examples", ROOT / "docs" / "fine-tuning.md"
BLOCK = re.compile(r"^ *```(sh|python)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
TINY = ["--quality", "fast", "--seq-len", "64", "--num-samples", "4", "--group-size", "32"]
TRAINING = ["--steps", "3", "--batch", "2", "--length", "96", "--learning-rate", "1e-2"]
NAMED = ["--base-model", "google/gemma-3-270m-it", "--license", "gemma"]
# What is added to each of the page's commands: small sizes, and what a test looks at.
MORE = {
    "quantize": TINY,
    "run": ["--max-new-tokens", "4", "--json"],
    "bench": ["--fidelity", "--windows", "1", "--device", "cpu", "--json"],
    "push": ["--yes", *NAMED],
    "export": [],
}
# What stands for the page's model, data set and machine.
SMALL = {"google/gemma-3-1b-it": "small-it", "HuggingFaceH4/ultrachat_200k": "conversations.jsonl", "8": "2"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
ALL_WEIGHTS = "my-model"  # in the commands of those who train all weights
Said = dict[str, str]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


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


def blocks(language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(PAGE.read_text(encoding="utf-8")) if kind == language]


def commands() -> list[list[str]]:
    return [shlex.split(line, comments=True) for text in blocks("sh") for line in text.splitlines()]


@pytest.fixture
def follow(
    instruct: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[list[str]], bool]], Said]:
    """Run those of the page's commands that are chosen, in an own folder; what each has printed, by its words."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(instruct, "small-it")
    shutil.copytree(EXAMPLES, "examples")
    shutil.copyfile(EXAMPLES / "data" / "conversations.jsonl", "conversations.jsonl")

    def one(command: list[str]) -> str:
        program, *words = (SMALL.get(word, word) for word in command)
        if program in ("python", "torchrun"):
            return run(*([sys.executable] if program == "python" else TORCHRUN), *words, *TRAINING)
        assert program == "gemma-awq"
        capsys.readouterr()
        assert main([*words, *MORE[words[0]]]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    def all_of(chosen: Callable[[list[str]], bool]) -> Said:
        return {" ".join(command): one(command) for command in commands() if chosen(command)}

    return all_of


def is_tried(command: list[str]) -> bool:
    """Nothing is installed or published."""
    return command[0] != "pip" and (command[1] != "push" or "--dry-run" in command)


def compared(said: Said) -> list[float]:
    """The divergences that `bench --compare` found, the fine-tune's artifact first."""
    (text,) = (text for command, text in said.items() if " bench " in command)
    models = json.loads(text)["models"]
    assert [model["name"] for model in models] == ["my-awq", "base-awq"]
    return [model["fidelity"]["kl"] for model in models]


def require_published(said: Said) -> None:
    """The artifact answers, and could be published."""
    (answer,) = (text for command, text in said.items() if " run " in command)
    assert json.loads(answer)["tokens"] >= 1
    (plan,) = (text for command, text in said.items() if " push " in command)
    assert "model.safetensors" in plan


def test_the_pages_commands_are_known() -> None:
    """The two ways through the page, below, are all of it."""
    tried = [command for command in commands() if is_tried(command)]
    assert {command[0] for command in tried} == {"python", "torchrun", "gemma-awq"}
    scripts = {word for command in tried for word in command if word.endswith(".py")}
    assert scripts == {f"examples/{path.name}" for path in EXAMPLES.glob("*.py")} - {"examples/conversations.py"}


@pytest.mark.usefixtures("warm_python")
def test_the_way_of_an_adapter(follow: Callable[[Callable[[list[str]], bool]], Said]) -> None:
    for package in ("peft", "trl", "bitsandbytes"):
        pytest.importorskip(package)
    said = follow(lambda command: is_tried(command) and ALL_WEIGHTS not in command)
    assert "Next: gemma-awq quantize ./small-it --adapter my-lora" in " ".join(said.values())
    layers = json.loads(Path("small-it/config.json").read_text())["num_hidden_layers"]
    for adapter in ("my-lora", "my-4bit-lora"):
        # B begins at zero, so what is not zero was learned
        tensors = load_file(f"{adapter}/adapter_model.safetensors")
        learned = [tensor for name, tensor in tensors.items() if "lora_B" in name]
        assert len(learned) == 7 * layers
        assert all(tensor.abs().max() > 0 for tensor in learned)
    require_published(said)
    assert min(compared(said)) > 0  # three steps of an adapter move a random model less than quantizing does
    (training,) = (text for command, text in said.items() if "lora_on_artifact" in command)
    losses = [float(loss) for loss in re.findall(r"'loss': '?([\d.e+-]+)", training)]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    assert Path("my-second-awq/quantization_report.json").is_file()
    (snippet,) = blocks("python")
    shown = "\nprint(model.peft_config['default'].base_model_name_or_path)"
    assert run(sys.executable, "-c", dedent(snippet) + shown, PYTHONPATH=f"{ROOT}{os.pathsep}examples") == "base-awq\n"


@pytest.mark.usefixtures("warm_python")
def test_the_way_of_all_weights(follow: Callable[[Callable[[list[str]], bool]], Said]) -> None:
    said = follow(
        lambda command: (
            is_tried(command)
            and (ALL_WEIGHTS in command or command[1] in ("run", "push") or command[-2:] == ["-o", "base-awq"])
        )
    )
    assert "Next: gemma-awq quantize my-model" in " ".join(said.values())
    before, after = load_file("small-it/model.safetensors"), load_file("my-model/model.safetensors")
    assert before.keys() == after.keys()
    assert all(after[name].dtype == torch.bfloat16 and after[name].shape == before[name].shape for name in before)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) == len(before)  # each process's parts, of every tensor
    require_published(said)
    kl = compared(said)
    assert 0 < kl[0] < kl[1]


@pytest.mark.thorough
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
