"""`quantize --dry-run` of a hub id: the plan of the fetched folder, made from the headers of the files on the hub."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma_awq_cli.models.checkpoints.headers import FIRST_BYTES
from tests import samples
from tests.hub_server import HubServer, Repo, client_environment, hub_server
from tests.tiny import make_checkpoint

PADDING = 4 * FIRST_BYTES  # of each file: what is fetched beyond the header shows
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("warm_python")]  # each starts the command once or twice
KINDS = ("gemma3", "gemma4", "gemma4-experts", "gemma3n_text")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("models")
    made = {kind: make_checkpoint(root / kind, kind, sharded=kind == "gemma4") for kind in KINDS}
    for folder in made.values():
        for file in folder.glob("*.safetensors"):
            save_file({**load_file(file), f"padding.{file.stem}": torch.zeros(PADDING, dtype=torch.int8)}, file)
    made["damaged"] = make_checkpoint(root / "damaged", "gemma")
    (made["damaged"] / "model.safetensors").write_bytes(b"\x7f" * PADDING)
    made["deep"] = make_checkpoint(root / "deep", "gemma")
    (made["deep"] / "model.safetensors").write_bytes((20).to_bytes(8, "little") + b'{"a": {"shape": 3}} ')
    return made


@pytest.fixture(scope="module")
def hub(folders: Mapping[str, Path]) -> Iterator[HubServer]:
    repos = {f"org/{kind}": Repo({"main": folder}) for kind, folder in folders.items()}
    with hub_server(repos) as server:
        yield server


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(f"The model reads sentence number {n} of this text." for n in range(400)))
    return path


def here(home: Path, variables: Mapping[str, str]) -> dict[str, str]:
    return {**client_environment(home, variables), "PYTHONPATH": os.getcwd()}


def dry_run(
    model: str, text: Path, home: Path, variables: Mapping[str, str], *more: str
) -> subprocess.CompletedProcess[str]:
    options = ["--calibration", str(text), "--num-samples", "4", "--seq-len", "16", "--device", "cpu", "-o", "out"]
    command = [sys.executable, "-m", "gemma_awq_cli", "quantize", model, *options, "--dry-run", "--json", *more]
    return subprocess.run(
        command, env=here(home, variables), cwd=home, capture_output=True, text=True, timeout=600
    )  # fmt: skip


@pytest.mark.parametrize("kind", samples.of(KINDS, ["gemma4"]))
def test_the_plan_is_that_of_the_folder_and_no_weight_was_fetched(
    kind: str, folders: Mapping[str, Path], hub: HubServer, text: Path, tmp_path: Path
) -> None:
    hub.requests.clear()
    planned = dry_run(f"org/{kind}", text, tmp_path, {"HF_ENDPOINT": hub.url})
    assert planned.returncode == 0, planned.stderr
    assert "--qat keep plans for a QAT checkpoint" in planned.stderr

    asked = [r for r in hub.requests if r.path.endswith(".safetensors")]
    files = list(folders[kind].glob("*.safetensors"))
    assert len(asked) == len(files)
    assert (len(files) > 1) is (kind == "gemma4")
    assert all((r.start, r.status, r.sent) == (0, 206, FIRST_BYTES) for r in asked), asked
    assert not list(tmp_path.rglob("*.safetensors"))

    of_folder = dry_run(str(folders[kind]), text, tmp_path, {"HF_ENDPOINT": hub.url})
    assert json.loads(planned.stdout) == json.loads(of_folder.stdout)


def test_a_plan_leaves_nothing_that_counts_as_the_model(hub: HubServer, text: Path, tmp_path: Path) -> None:
    """Its small files lie in the cache. Without the hub they are no model, and with it the weights are fetched."""
    dry_run("org/gemma3", text, tmp_path, {"HF_ENDPOINT": hub.url})
    offline = dry_run("org/gemma3", text, tmp_path, {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "1"})
    assert offline.returncode == 1
    assert "HF_HUB_OFFLINE is set" in offline.stderr


def test_weights_that_are_there_are_looked_at(hub: HubServer, text: Path, tmp_path: Path) -> None:
    """After a fetch a plan knows whether the weights lie on a grid, and needs no hub."""
    code = (
        "import sys\nfrom gemma_awq_cli.models.checkpoints.source import find_source\n"
        "find_source('org/gemma3', None, print)"
    )
    environment = here(tmp_path, {"HF_ENDPOINT": hub.url})
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=600)
    hub.requests.clear()
    planned = dry_run("org/gemma3", text, tmp_path, {"HF_ENDPOINT": hub.url})
    assert planned.returncode == 0, planned.stderr
    assert "--qat keep" not in planned.stderr
    assert not [r for r in hub.requests if r.path.endswith(".safetensors")]
    offline = dry_run("org/gemma3", text, tmp_path, {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "1"})
    assert json.loads(offline.stdout) == json.loads(planned.stdout)


def test_a_grid_is_kept_in_the_plan_on_request(hub: HubServer, text: Path, tmp_path: Path) -> None:
    planned = dry_run("org/gemma3", text, tmp_path, {"HF_ENDPOINT": hub.url}, "--qat", "keep")
    document = json.loads(planned.stdout)
    assert (document["group_size"], document["keeps_grid"]) == (32, True)


@pytest.mark.parametrize(
    ("name", "why"),
    [("damaged", "model.safetensors is no safetensors file"), ("deep", "the header's entry of a makes no sense")],
)
def test_a_header_that_is_none_is_explained(name: str, why: str, hub: HubServer, text: Path, tmp_path: Path) -> None:
    planned = dry_run(f"org/{name}", text, tmp_path, {"HF_ENDPOINT": hub.url})
    assert planned.returncode == 1
    error, hint = planned.stderr.splitlines()[-2:]
    assert error.startswith("error: ")
    assert why in error
    assert hint.startswith("hint: ")
