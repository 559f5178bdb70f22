"""A model on the hub: its small files and the headers of its weights are fetched, the weights are not."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from tests.hub_server import HubServer, Repo, hub_server
from tests.inspection import folders
from tests.inspection.folders import gguf, model_tensors, write_model

BIG = {**folders.CONFIG, "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 4, "head_dim": 128}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    root = tmp_path_factory.mktemp("hub")
    big = write_model(root / "big", model_tensors(BIG, folders.awq_gemm), BIG, quantization_config={
        "quant_method": "awq", "bits": 4, "group_size": 32})  # fmt: skip
    other = write_model(root / "other", model_tensors(BIG), BIG)
    adapter = root / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
    (root / "gguf").mkdir()
    tokens = [f"<{i}>" for i in range(300_000)]
    (root / "gguf" / "m-Q4_0.gguf").write_bytes(gguf({"general.architecture": "gemma", "tokenizer.t": tokens}, {}))
    repos = {
        "org/big": Repo({"main": big, "v1": other}),
        "org/whole": Repo({"main": big}, whole=True),
        "org/adapter": Repo({"main": adapter}),
        "org/gguf": Repo({"main": root / "gguf"}),
        "org/gated": Repo({"main": big}, gated=True),
    }
    with hub_server(repos) as server:
        yield server


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(hub: HubServer, tmp_path: Path) -> Run:
    def inspect(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment = {
            **inherited, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1", **variables,
        }  # fmt: skip
        hub.requests.clear()
        code = (
            "import sys; from gemma_awq_cli.cli.app import main; code = main(sys.argv[1:])\n"
            "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)\nsys.exit(code)"
        )
        command = [sys.executable, "-c", code, "inspect", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    return inspect


def weights(hub: HubServer, ending: str = ".safetensors") -> Mapping[str, int]:
    """How many bytes of weights were sent, by file."""
    sent: dict[str, int] = {}
    for one in hub.requests:
        if one.path.endswith(ending):
            sent[one.path] = sent.get(one.path, 0) + one.sent
    return sent


def test_no_weights_are_fetched(hub: HubServer, run: Run) -> None:
    done = run("org/big", "--json")
    facts = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert facts["identity"]["format"] == "AWQ"
    assert facts["linears"]["packed"] == 14
    assert facts["missing"]["count"] == 0
    assert not facts["problems"]
    assert facts["revision"] == hub.repos["org/big"].commit("main")
    (sent,) = weights(hub).values()
    assert sent == 128 * 1024 < facts["storage"]["bytes"] / 10
    assert {one.status for one in hub.requests if one.path.endswith(".safetensors")} == {206}
    assert not any(one.path.endswith("tokenizer.json") for one in hub.requests)


def test_a_revision(run: Run) -> None:
    facts = json.loads(run("org/big", "--revision", "v1", "--json").stdout)
    assert facts["identity"]["quantized"] is False


def test_a_server_that_sends_whole_files_is_left(hub: HubServer, run: Run) -> None:
    """What it sends beyond the header is not read; a connection may hold some of it."""
    done = run("org/whole", "--json")
    assert json.loads(done.stdout)["linears"]["packed"] == 14


def test_an_adapter_and_a_gguf(hub: HubServer, run: Run) -> None:
    assert json.loads(run("org/adapter", "--json").stdout)["adapter"]["rank"] == 8
    facts = json.loads(run("org/gguf", "--json").stdout)
    (file,) = facts["gguf"]
    assert (file["architecture"], file["file_type"]) == ("gemma", "Q4_0")
    assert sum(weights(hub, ".gguf").values()) == 2**20 < file["bytes"] / 2


def test_the_cache_serves_when_the_hub_does_not(run: Run) -> None:
    assert run("org/big").returncode == 0
    for variables in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        done = run("org/big", "--json", **variables)
        assert done.returncode == 0, done.stderr
        facts = json.loads(done.stdout)
        assert facts["family"]["model_type"] == "gemma"
        assert "no weights in the local cache of the hub" in facts["problems"][0]["message"]
    assert "Its copy in the local cache is shown" in done.stderr


@pytest.mark.parametrize(
    ("asked", "said"),
    [("org/nothing", "does not show org/nothing"), ("org/gated", "is gated"), ("nothing", "neither a folder")],
)
def test_what_cannot_be_had(asked: str, said: str, run: Run) -> None:
    done = run(asked)
    assert done.returncode == 1
    assert said in done.stderr
    assert not done.stdout


def test_a_copy_is_recognized_by_its_hash(hub: HubServer, run: Run) -> None:
    folder = hub.repos["org/big"].revisions["main"]
    found = json.loads(run(str(folder), "--compare", "org/big", "--json").stdout)
    assert found["tensors"]["equal"] == 48
    assert found["tensors"]["not_compared"] == 0
    assert found["files"] == []
    (sent,) = weights(hub).values()
    assert sent <= 2 * 128 * 1024


def test_qat_grid_needs_weights(run: Run) -> None:
    done = run("org/big", "--revision", "v1", "--qat-grid")
    assert done.returncode == 2
    assert "hf download org/big" in done.stderr
