"""What is said of this tool's own checkpoints and artifacts, and whether the readers' rules are the readers'."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import jsonschema
import pytest
from transformers.quantizers.quantizers_utils import should_convert_module

from gemma_awq_cli import __version__
from gemma_awq_cli.cli.app import main
from gemma_awq_cli.inspection import readers
from gemma_awq_cli.inspection.contents import local_contents
from gemma_awq_cli.inspection.facts import Identity, ModelFacts
from gemma_awq_cli.inspection.model import inspect_contents
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.gemma.families import FAMILIES
from tests.conftest import FAMILIES as KINDS
from tests.inspection import folders
from tests.tiny import edit_weights, make_checkpoint, make_tokenizer, original_model, snap_to_grid

DOCS = Path(__file__).parent.parent.parent / "docs"
# of every kind of layer; others would only take time
QUANTIZED = ("gemma", "gemma3", "gemma4", "gemma4-experts")


def inspect(folder: Path) -> ModelFacts:
    return inspect_contents(local_contents(folder, str(folder)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint(kind: str, checkpoints: Callable[[str], Path]) -> None:
    folder = checkpoints(kind)
    facts = inspect(folder)
    own = Checkpoint(folder)
    assert facts.problems == ()
    assert facts.family is not None
    assert facts.family.title == own.family.title
    assert facts.identity == Identity("16-bit", "bfloat16", None, 16, quantized=False)
    assert facts.sizes is not None
    assert (facts.sizes.layers, facts.sizes.hidden) == (own.shape.layers, own.shape.hidden)
    assert facts.storage is not None
    assert facts.storage.parameters == sum(p.numel() for p in _parameters(folder))
    assert facts.storage.elements == sum(info.nbytes // 2 for info in own.tensors.values())
    assert facts.head is not None
    assert facts.head.tied == own.tied_head
    assert facts.unread is not None
    assert facts.unread.count == 0


def _parameters(folder: Path) -> Iterable[object]:
    """A model's parameters and the buffers that are stored, the shared keys and values that nobody needs left out."""
    model = original_model(folder)
    return [*model.parameters(), *(b for name, b in model.named_buffers() if name in model.state_dict())]


@pytest.mark.parametrize("kind", QUANTIZED)
def test_an_artifact(kind: str, artifacts: Callable[[str], Path]) -> None:
    facts = inspect(artifacts(kind))
    assert facts.problems == ()
    assert facts.identity == Identity("AWQ", "gemm", f"gemma-awq {__version__}", 4, 32, False)
    assert facts.fidelity is not None
    assert facts.fidelity["kl"] > 0
    assert facts.linears is not None
    assert facts.linears.packed == sum(len(one.packed()) for one in Checkpoint(artifacts(kind)).shape.layouts)
    assert facts.linears.bits16.count == 0
    reads = {one.reader: one.reads for one in facts.readers}
    assert reads["gemma-awq"] == "yes"
    assert reads["transformers"] == {"gemma": "yes", "gemma4-experts": "no"}.get(kind, "with limits")
    assert reads["vLLM"] == ("with limits" if kind == "gemma4-experts" else "yes")


def test_a_list_that_vllm_reads_and_transformers_does_not(artifacts: Callable[[str], Path], tmp_path: Path) -> None:
    """The fault that `modules_to_not_convert` names towers twice for."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in artifacts("gemma3").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"] = ["lm_head", "vision_tower", "multi_modal_projector"]
    (folder / "config.json").write_text(json.dumps(config))
    facts = inspect(folder)
    reads = {one.reader: one.reads for one in facts.readers}
    assert (reads["transformers"], reads["vLLM"]) == ("no", "yes")
    (problem,) = facts.problems
    assert "model.vision_tower." in problem.message
    assert "model.vision_tower" in problem.hint


LISTS = [
    *(family.not_converted for family in FAMILIES.values()),
    ("lm_head", "vision_tower"), ("down_proj",), ("model.layers.1",), ("layers.0",), ("model.layers.1.mlp.up_proj",),
    (".*mlp",), (".*up",), ("proj",), ("",), ("model.",), ("q_proj.",),
]  # fmt: skip
NAMES = [
    *(f"model.layers.{i}.{name}" for i in (0, 1, 10, 11) for name in ("self_attn.q_proj", "mlp.up_proj")),
    "model.vision_tower.encoder.layers.0.mlp.fc1", "model.language_model.layers.0.per_layer_input_gate",
    "model.language_model.layers.0.laurel.linear_left", "model.altup_projections.0", "lm_head",
]  # fmt: skip


@pytest.mark.parametrize("kept", LISTS)
def test_the_rule_for_names_is_that_of_transformers(kept: tuple[str, ...]) -> None:
    for name in NAMES:
        assert readers._by_regex(name, kept) == should_convert_module(name, list(kept)), name


def test_towers_that_are_missing(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "gemma3", "gemma3")

    def cut(tensors: dict[str, object]) -> None:
        for name in [name for name in tensors if "vision_tower" in name]:
            del tensors[name]

    edit_weights(folder, cut)
    (problem,) = inspect(folder).problems
    assert problem.message == "config.json describes a vision_config, but the files hold no vision_tower."


def test_a_qat_grid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_checkpoint(tmp_path / "qat", "gemma")
    assert main(["inspect", str(folder), "--qat-grid", "--json"]) == 0
    before = json.loads(capsys.readouterr().out)["qat_grid"]
    snap_to_grid(folder)
    assert main(["inspect", str(folder), "--qat-grid", "--json"]) == 0
    after = json.loads(capsys.readouterr().out)["qat_grid"]
    assert (before["on_grid"], after["on_grid"]) == (0, after["groups"])


def test_no_torch_and_little_else_is_imported(checkpoints: Callable[[str], Path]) -> None:
    code = (
        "import sys\nfrom gemma_awq_cli.cli.app import main\nassert main(sys.argv[1:]) == 0\n"
        "assert not {'torch', 'transformers', 'numpy', 'datasets', 'huggingface_hub'} & set(sys.modules)\n"
    )
    for options in ([], ["--json"], ["--compare", str(checkpoints("gemma2"))]):
        command = [sys.executable, "-c", code, "inspect", str(checkpoints("gemma3")), *options]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ})


def test_the_documents_match_their_schemas(
    checkpoints: Callable[[str], Path],
    artifacts: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter, gguf, broken = tmp_path / "adapter", tmp_path / "x.gguf", tmp_path / "broken"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"r": 8, "base_model_name_or_path": "google/gemma-2b"}')
    gguf.write_bytes(folders.gguf({"general.architecture": "gemma", "general.file_type": 2}, {"a": (2, (32,))}))
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    schema = json.loads((DOCS / "inspect-schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    models = (checkpoints("gemma3n"), checkpoints("gemma4-experts"), artifacts("gemma3"), adapter, gguf, broken)
    for model in models:
        assert main(["inspect", str(model), "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        jsonschema.validate(document, {**schema, "anyOf": [{"$ref": "#/$defs/model"}]})
    assert main(["inspect", str(artifacts("gemma3")), "--compare", str(checkpoints("gemma3")), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    jsonschema.validate(document, {**schema, "anyOf": [{"$ref": "#/$defs/comparison"}]})


def test_a_comparison(checkpoints: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = make_checkpoint(tmp_path / "one", "gemma")
    other = make_checkpoint(tmp_path / "other", "gemma")
    assert main(["inspect", str(one), "--compare", str(other)]) == 0
    assert "No difference was found." in capsys.readouterr().out
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5, "new": {"a": [1, 2]}}))
    make_tokenizer(other, chat=True)
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (other / "model.safetensors").write_bytes(data)
    assert main(["inspect", str(one), "--compare", str(other), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["config"] == [
        {"name": "rms_norm_eps", "one": "1e-06", "other": "1e-05"}, {"name": "new.a", "one": None, "other": "[1, 2]"}
    ]  # fmt: skip
    assert found["tensors"]["other_bytes"]["count"] == 1
    assert found["tensors"]["equal"] == 28
    assert [one["name"] for one in found["files"]] == ["chat_template.jinja"]
    assert main(["inspect", str(one), "--compare", str(other)]) == 0
    out = capsys.readouterr().out
    assert "rms_norm_eps" in out
    assert "chat_template.jinja" in out


def test_options_that_exclude_each_other(checkpoints: Callable[[str], Path], artifacts: Callable[[str], Path]) -> None:
    folder = str(checkpoints("gemma"))
    assert main(["inspect", folder, "--qat-grid", "--compare", folder]) == 2
    assert main(["inspect", str(artifacts("gemma")), "--qat-grid"]) == 2
    assert main(["inspect", folder, "--revision", "main"]) == 2
