"""`push --foreign`: a 4-bit model that another tool made. Its card says so, and claims nothing that nobody measured."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from gemma_awq_cli.bench.document import BENCH
from gemma_awq_cli.cli.app import main
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.staging import REPORT
from gemma_awq_cli.publish.foreign_model import prepare_foreign
from tests.models.packed_formats.foreign import compressed_tensors, gptq, pack_quantized, rewrite
from tests.models.packed_formats.test_foreign import AUTO_ROUND, GPTQ, GROUP
from tests.publish.test_push import client, hub  # noqa: F401 (fixtures)
from tests.tiny import edit_weights
from tests.writing_hub import WritingHub

Capture = pytest.CaptureFixture[str]
Artifacts = Callable[[str], Path]
QUANTIZER = {"quantizer": ["gptqmodel:7.7.0"], "damp_percent": 0.01}
MADE = "---\nlicense: gemma\nbase_model: org/tiny\n---\n# Somebody's model\n"


@pytest.fixture
def foreign(artifacts: Artifacts, tmp_path: Path) -> Path:
    """A GPTQ model as GPTQModel leaves it, with a linear in 16 bits."""
    section = {**GPTQ, "sym": False, "meta": QUANTIZER}
    folder = rewrite(artifacts("gemma3_text"), tmp_path / "foreign", gptq(1), section, lambda n: "0.mlp.up" in n)
    (folder / "README.md").write_text(MADE, encoding="utf-8")
    (folder / "quantize_config.json").write_text(json.dumps(section), encoding="utf-8")
    return folder


def push(folder: Path, *more: str) -> int:
    return main(["push", "me/tiny-GPTQ", str(folder), "--yes", *more])


def words(captured: str) -> str:
    return " ".join(captured.split())


def test_the_card_says_who_quantized_it_and_claims_no_fidelity(foreign: Path) -> None:
    made = prepare_foreign(foreign, "me/tiny-GPTQ", None, None, None)
    assert made.report is None
    card = words(made.card)
    for text in (
        "**It was quantized with gptqmodel 7.7.0, and not by `gemma-awq`**",
        "What quantizing cost in fidelity was not measured for this page.",
        "model.safetensors and config.json were modified from org/tiny",
        "gemma-awq did not make or change them",
        "Gemma is provided under and subject to the Gemma Terms of Use",
        "| Method | GPTQ, 4 bits |",
        "groups of 32; 20 linears |",
        "| Linears that were left in bfloat16 | 1 |",
        "How the model was calibrated is not recorded",
    ):
        assert text in card, text
    for word in ("KL divergence", "Perplexity", "held-out", "calibration rows"):
        assert word not in card, word
    data = ModelCard(made.card).data
    assert (data.base_model, data.base_model_relation, data.license) == ("org/tiny", "quantized", "gemma")
    assert set(data.tags) == {"gemma", "gptq", "4-bit", "int4"}
    assert not data.eval_results
    names = {file.name for file in made.files}
    assert {"Notice", "GEMMA_TERMS_OF_USE.md", "README.md", "quantize_config.json", "tokenizer.json"} <= names
    assert any("README.md is replaced" in note for note in made.notes)


def test_it_arrives_and_a_second_push_sends_nothing(
    hub: WritingHub,  # noqa: F811
    foreign: Path,
    capsys: Capture,
) -> None:
    assert push(foreign, "--foreign") == 0
    assert b"and not by `gemma-awq`" in hub.read("me/tiny-GPTQ", "README.md")
    assert hub.read("me/tiny-GPTQ", "model.safetensors") == (foreign / "model.safetensors").read_bytes()
    assert push(foreign, "--foreign") == 0
    assert "Nothing had to be sent" in capsys.readouterr().err
    path = foreign / "generation_config.json"
    path.write_text('{"eos_token_id": 1, "do_sample": true}')
    assert push(foreign, "--foreign") == 0  # the card there is this tool's


@pytest.mark.parametrize(
    ("section", "tool"),
    [
        ({**GPTQ, "sym": False, "meta": {"quantizer": ["<b>x</b>"]}}, "a tool that left no name"),
        ({**AUTO_ROUND, "sym": False, "packing_format": "auto_round:auto_gptq", "autoround_version": "0.16.1"},
         "AutoRound 0.16.1"),
    ],
    ids=["markup", "autoround"],
)  # fmt: skip
def test_who_quantized_it(section: dict[str, Any], tool: str, foreign: Path) -> None:
    path = foreign / "config.json"
    config = {**json.loads(path.read_text(encoding="utf-8")), "quantization_config": section}
    path.write_text(json.dumps(config), encoding="utf-8")
    assert f"quantized with {tool}" in words(prepare_foreign(foreign, "me/tiny", None, None, None).card)


def test_llm_compressor_leaves_a_recipe(artifacts: Artifacts, tmp_path: Path) -> None:
    folder = rewrite(artifacts("gemma"), tmp_path / "foreign", compressed_tensors(False), pack_quantized(False, GROUP))
    (folder / "recipe.yaml").write_text("default_stage: {}\n")
    made = prepare_foreign(folder, "me/tiny", "org/tiny", "gemma", None)
    assert "quantized with llm-compressor, and not" in words(made.card)
    assert "recipe.yaml" in {file.name for file in made.files}


def test_without_foreign_the_hint_names_it(foreign: Path, artifacts: Artifacts, capsys: Capture) -> None:
    assert push(foreign, "--dry-run") == 1
    said = words(capsys.readouterr().err)
    assert f"has no {REPORT}" in said
    assert "pushed with --foreign" in said
    assert push(artifacts("gemma"), "--dry-run", "--foreign") == 2
    assert "Push it without --foreign" in words(capsys.readouterr().err)
    assert push(foreign, "--dry-run", "--foreign", "--deep") == 2
    assert "--deep measures again what a report says" in words(capsys.readouterr().err)


def no_card(folder: Path) -> None:
    (folder / "README.md").unlink()


def no_licence(folder: Path) -> None:
    (folder / "README.md").write_text("---\nbase_model: org/tiny\n---\n")


def another_licence(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model: org/tiny\n---\n")


def two_bases(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: gemma\nbase_model: [a/b, c/d]\n---\n")


def secret(folder: Path) -> None:
    path = folder / "quantize_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "note": "hf_" + "aB3dE5fG7hJ9kL1mN3pQ5rS7tU9vW1xYz4"}))


def stray(folder: Path) -> None:
    (folder / "train.log").write_text("loss")


def not_finite(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors["model.layers.1.mlp.down_proj.scales"].fill_(float("nan")))


def missing(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.pop("model.layers.1.mlp.down_proj.scales"))


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


BAD: dict[Callable[[Path], None], tuple[str, str]] = {
    no_card: ("16-bit model that this one was made from is unknown", "--base-model"),
    no_licence: ("declares no licence", "--license gemma"),
    another_licence: ("declares the licence mit", "--license"),
    two_bases: ("made from is unknown", "--base-model"),
    secret: ("quantize_config.json", ""),
    stray: ("train.log", "Move them out"),
    not_finite: ("holds NaN or infinite", ""),
    missing: ("lacks the tensor model.layers.1.mlp.down_proj.scales", ""),
    no_tokenizer: ("tokenizer", ""),
}


@pytest.mark.parametrize("change", BAD, ids=lambda change: change.__name__)
def test_what_may_not_be_published(change: Callable[[Path], None], foreign: Path) -> None:
    change(foreign)
    message, hint = BAD[change]
    with pytest.raises(GemmaAwqError) as caught:
        prepare_foreign(foreign, "me/tiny", None, None, None)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_a_16_bit_model_is_not_one(checkpoints: Artifacts, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints("gemma"), tmp_path / "model"))
    with pytest.raises(GemmaAwqError, match="holds a 16-bit model") as caught:
        prepare_foreign(folder, "me/tiny", "org/tiny", "gemma", None)
    assert "gemma-awq quantize" in caught.value.hint


def test_what_was_measured_here_is_shown(
    foreign: Path, checkpoints: Artifacts, text_file: Path, capsys: Capture
) -> None:
    asked = ["bench", str(foreign), "--fidelity", "--reference", str(checkpoints("gemma3_text")), "--text",
             str(text_file), "--device", "cpu", "--save"]  # fmt: skip
    assert main(asked) == 0
    capsys.readouterr()
    bench = json.loads((foreign / BENCH).read_text())
    measured = bench["models"][0]["fidelity"]
    made = prepare_foreign(foreign, "me/tiny", None, None, None)
    assert f"| KL divergence, nats per token | 0 | {measured['kl']:.4f} |" in words(made.card)
    assert "was not measured for this page" not in made.card
    assert Checkpoint(foreign).identity() == bench["models"][0]["identity"]
    edit_weights(foreign, lambda tensors: tensors["model.norm.weight"].add_(1))
    with pytest.raises(GemmaAwqError, match="was measured on other weights"):
        prepare_foreign(foreign, "me/tiny", None, None, None)
