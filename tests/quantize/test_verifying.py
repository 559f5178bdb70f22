"""`verify`: an artifact is the same as made once more, and whatever was changed in it is found, or said to be open."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gemma_awq_cli.cli.app import main
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.publish.preparation import prepare
from gemma_awq_cli.quantize.verifying import VerifyRequest, recorded_request
from tests.conftest import quantize_arguments
from tests.documents import full_report, planted
from tests.hub_server import Repo, client_environment, hub_server

Capture = pytest.CaptureFixture[str]
REPORT = "quantization_report.json"


@pytest.fixture
def artifact(tmp_path: Path, artifacts: Callable[[str], Path]) -> Path:
    """A copy that may be changed."""
    target = tmp_path / "my-awq"
    shutil.copytree(artifacts("gemma3_text"), target)
    return target


def verify(capsys: Capture, *arguments: str) -> tuple[int, dict[str, Any], str]:
    capsys.readouterr()
    code = main(["verify", *arguments, "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out or "{}"), captured.err


def edit_weights(folder: Path, name: str) -> None:
    """Change one bit of a tensor."""
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors[name].view(-1)[3] += 1
    save_file(tensors, path, metadata)


def edit_report(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    report = json.loads((folder / REPORT).read_text())
    change(report)
    (folder / REPORT).write_text(json.dumps(report))


@pytest.mark.parametrize("kind", ["gemma3_text", "gemma3n_text"])
def test_every_layer_is_the_same(kind: str, artifacts: Callable[[str], Path], capsys: Capture) -> None:
    code, found, _ = verify(capsys, str(artifacts(kind)), "--layers", "100")
    assert (code, found["verdict"]) == (0, "same")
    assert found["layers"] == list(range(1, found["of"] + 1))
    assert found["different"] == found["conditions"] == []


@pytest.mark.slow
def test_a_layer_that_is_corrected_for_those_before_it(
    tmp_path: Path, checkpoints: Callable[[str], Path], text_file: Path, capsys: Capture
) -> None:
    """At `best` a layer is quantized on what the quantized layers before it give: those that are stored."""
    folder = tmp_path / "best"
    few = ("--num-samples", "6", "--quality", "best")
    assert main([*quantize_arguments(checkpoints("gemma"), folder, text_file), *few]) == 0
    code, found, _ = verify(capsys, str(folder), "--layers", "1", "--seed", "5")
    assert (code, found["layers"], found["of"]) == (0, [3], 3)


def test_the_seed_picks_the_layers(artifact: Path, capsys: Capture) -> None:
    first = verify(capsys, str(artifact), "--layers", "1", "--seed", "5")
    assert first[0] == 0
    assert "seed 5" in first[2]
    assert first[1]["layers"] == verify(capsys, str(artifact), "--layers", "1", "--seed", "5")[1]["layers"]
    assert main(["verify", str(artifact), "--layers", "1"]) == 0
    shown = capsys.readouterr().out
    assert "same" in shown
    assert "picked by seed" in shown


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.qweight", "model.layers.1.input_layernorm.weight", "model.norm.weight"]
)
def test_a_changed_weight_is_found(name: str, artifact: Path, capsys: Capture) -> None:
    edit_weights(artifact, name)
    code, found, _ = verify(capsys, str(artifact), "--layers", "100")
    assert (code, found["verdict"], found["different"]) == (1, "different", [name])


def test_changed_files_are_found(artifact: Path, capsys: Capture) -> None:
    config = json.loads((artifact / "config.json").read_text())
    (artifact / "config.json").write_text(json.dumps({**config, "rope_theta": 5.0}))
    (artifact / "tokenizer_config.json").write_bytes((artifact / "tokenizer_config.json").read_bytes() + b"\n")
    code, found, _ = verify(capsys, str(artifact), "--layers", "1")
    assert (code, found["different"]) == (1, ["config.json", "tokenizer_config.json"])


def test_under_other_conditions_a_difference_proves_nothing(artifact: Path, capsys: Capture) -> None:
    edit_report(artifact, lambda report: report["fingerprint"].update(torch="2.0.0"))
    code, found, err = verify(capsys, str(artifact), "--layers", "100")
    assert (code, found["verdict"]) == (0, "same"), "the same bytes are the same bytes"
    assert "torch: 2.0.0 then" in err
    edit_weights(artifact, "model.layers.0.mlp.up_proj.qweight")
    code, found, _ = verify(capsys, str(artifact), "--layers", "100")
    assert (code, found["verdict"]) == (4, "cannot be compared")
    assert found["conditions"][0].startswith("torch: 2.0.0 then")
    edit_weights(artifact, "model.norm.weight")  # which is copied, and not computed
    assert verify(capsys, str(artifact), "--layers", "1")[0] == 1


def test_as_many_threads_as_were_recorded(artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    used = [torch.get_num_threads()]
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: used[-1])
    edit_report(artifact, lambda report: report["fingerprint"].update(threads=2))
    _, found, err = verify(capsys, str(artifact), "--layers", "1")
    assert "threads" not in err
    assert found["conditions"] == []
    assert used == [1, 2, 1]


def test_what_cannot_be_had_is_no_difference(
    artifact: Path, tmp_path: Path, checkpoints: Callable[[str], Path], text_file: Path, capsys: Capture
) -> None:
    def refused(*more: str) -> str:
        code, _, err = verify(capsys, str(artifact), "--layers", "1", *more)
        assert code == 4
        assert "Traceback" not in err
        return err

    assert "The 16-bit model is not the one" in refused("--source", str(checkpoints("gemma")))
    other = tmp_path / "other.txt"
    other.write_text("Another text, of which there is enough for a few rows. " * 200)
    assert "The calibration rows are not those" in refused("--calibration", str(other))
    # as a published artifact names them
    edit_report(artifact, lambda report: report["arguments"].update(calibration="text.txt"))
    assert "text.txt does not exist" in refused()
    edit_report(artifact, lambda report: report["source"].update(model="gone"))
    assert "'gone' is neither a folder nor a hub id" in refused("--calibration", str(text_file))
    moved = ("--source", str(checkpoints("gemma3_text")), "--calibration", str(text_file))
    assert verify(capsys, str(artifact), "--layers", "1", *moved)[0] == 0
    for name, value in (("max_memory", "much"), ("quality", "perfect"), ("seq_len", 10**6), ("group_size", True)):
        edit_report(artifact, lambda report, name=name, value=value: report["arguments"].update({name: value}))  # type: ignore[misc]
        refused(*moved)
    os.remove(artifact / REPORT)
    assert "quantization_report.json" in refused()


def given_size(report: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in report.items() if name != "budget"}


def test_a_choice_within_a_budget_is_not_made_again() -> None:
    asked = VerifyRequest("org/artifact")
    with pytest.raises(GemmaAwqError, match="within a budget"):
        recorded_request(full_report(), asked, Path("out"), False)
    assert recorded_request(given_size(full_report()), asked, Path("out"), False)


def test_a_strangers_report_names_no_files_of_this_machine() -> None:
    report, asked = given_size(full_report()), VerifyRequest("org/artifact")
    made = recorded_request(report, asked, Path("out"), True)
    assert (made.model, made.revision, made.calibration) == ("google/gemma-2b", "0" * 40, "wikitext")
    for place, name, option in (
        (("source", "model"), "/etc", "--source"),
        (("source", "model"), "my-model", "--source"),
        (("arguments", "calibration"), "../text.txt", "--calibration"),
    ):
        with pytest.raises(GemmaAwqError, match="of another machine") as caught:
            recorded_request(planted(report, place, name), asked, Path("out"), True)
        assert option in caught.value.hint
        recorded_request(planted(report, place, name), asked, Path("out"), False)
    for share in ("//server/share", "\\\\server\\share"):
        with pytest.raises(GemmaAwqError, match="of another machine"):
            recorded_request(planted(report, ("source", "model"), share), asked, Path("out"), False)


@pytest.fixture
def published(artifact: Path, tmp_path: Path) -> Path:
    """A folder with what a push of the artifact uploads."""
    folder = tmp_path / "published"
    folder.mkdir()
    for file in prepare(artifact, "me/tiny-AWQ", "org/tiny", "gemma", None).files:
        if isinstance(file.content, bytes):
            (folder / file.name).write_bytes(file.content)
        else:
            shutil.copyfile(file.content, folder / file.name)
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("warm_python")
def test_a_repository_on_the_hub(
    published: Path, tmp_path: Path, checkpoints: Callable[[str], Path], text_file: Path
) -> None:
    """Fetched by the hub's own client. Its report names no folders of this machine, and its statement is looked at."""
    moved = ["--source", str(checkpoints("gemma3_text")), "--calibration", str(text_file), "--layers", "100", "--json"]

    def verified(*more: str) -> tuple[int, dict[str, Any], str]:
        with hub_server({"me/tiny-AWQ": Repo({"main": published})}) as hub:
            home = tmp_path / f"hub-{len(list(tmp_path.iterdir()))}"
            done = subprocess.run(
                [sys.executable, "-m", "gemma_awq_cli", "verify", "me/tiny-AWQ", *more],
                capture_output=True, text=True, check=False, cwd=tmp_path,
                env=client_environment(home, {"HF_ENDPOINT": hub.url, "OMP_NUM_THREADS": "1"}),
            )  # fmt: skip
        return done.returncode, json.loads(done.stdout or "{}"), done.stderr

    code, found, err = verified(*moved)
    assert (code, found["verdict"]) == (0, "same"), err
    assert found["stated_files"] == len(list(published.iterdir())) - 2  # but the statement and the card
    code, _, err = verified("--json")
    assert code == 4
    assert "of another machine" in err
    edit_weights(published, "model.layers.1.mlp.up_proj.qweight")
    code, found, _ = verified(*moved)
    assert (code, found["verdict"], found["different"]) == (1, "different", ["model.safetensors"])


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "Notice"])
def test_a_file_that_is_not_as_stated(name: str, published: Path, capsys: Capture) -> None:
    (published / "README.md").write_text("A card may be edited: the statement does not name it.")
    (published / name).write_bytes((published / name).read_bytes() + b" ")
    assert verify(capsys, str(published))[:2] == (
        1,
        {
            "artifact": str(published), "source": "provenance.json", "verdict": "different", "seed": 0, "layers": [],
            "of": 0, "different": [name], "conditions": [], "stated_files": len(list(published.iterdir())) - 2,
        },
    )  # fmt: skip
    os.remove(published / name)
    code, found, err = verify(capsys, str(published))
    if name == "config.json":  # without it the folder is no model
        assert code == 4
        assert "config.json" in err
    else:
        assert (code, found["different"]) == (1, [name])


@pytest.mark.parametrize(
    "statement",
    [
        "[]",
        "{}",
        '{"_type": "https://in-toto.io/Statement/v1", "subject": []}',
        '{"_type": "https://in-toto.io/Statement/v1", "subject": [{"name": "config.json"}]}',
        '{"_type": "https://in-toto.io/Statement/v1", "subject": [7]}',
        '{"_type": "https://in-toto.io/Statement/v1", "subject": [{"name": "../x", "digest": {"sha256": "HASH"}}]}',
        '{"_type": "https://in-toto.io/Statement/v1", "subject": [{"name": "x", "digest": {"sha256": "HAS"}}]}',
    ],
)
def test_a_statement_that_says_nothing(statement: str, artifact: Path, capsys: Capture) -> None:
    (artifact / "provenance.json").write_text(statement.replace("HASH", "0" * 64))
    code, _, err = verify(capsys, str(artifact), "--layers", "1")
    assert code == 4
    assert "provenance.json" in err
    assert "Traceback" not in err


def test_a_link_out_of_the_folder_is_not_hashed(published: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "elsewhere").write_bytes((published / "Notice").read_bytes())
    os.remove(published / "Notice")
    (published / "Notice").symlink_to(tmp_path / "elsewhere")
    code, _, err = verify(capsys, str(published))
    assert code == 4
    assert "leads out of its folder" in err
