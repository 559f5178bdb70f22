"""Fetching a checkpoint from a hub, against a hub on localhost, and what a MODEL argument that names none is told.

The hub's client reads its endpoint, cache and login when it is imported, so it runs in a process of its own: one for
each way of being connected, and in it one call for each model.
"""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.source import find_source
from tests.hub_server import TOKEN, HubServer, Repo, client_environment, hub_server

Asked = tuple[str, str | None, str]  # a model, a revision or None, and a token or ""

WEIGHTS = bytes(range(256)) * 64
FETCHED = {"config.json", "model.safetensors", "tokenizer.model", "chat_template.jinja", "README.md", "LICENSE"}
LEFT = {"pytorch_model.bin", "model-Q4_K_M.gguf", "onnx/model.onnx", ".gitattributes"}
ALWAYS = 10**6
STALE = f"{TOKEN}_expired"

CLIENT = """
import json, os, sys, time
from huggingface_hub import constants
time.sleep = lambda seconds: None  # the client waits between its tries
constants.DOWNLOAD_CHUNK_SIZE = 1024  # and counts what arrives in pieces larger than a test's weights
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.source import find_source
answers = []
for asked, revision, token in json.load(sys.stdin):
    os.environ["HF_TOKEN"] = token
    try:
        source = find_source(asked, revision, lambda note: None)
        answers.append({"folder": str(source.folder), "name": source.name, "revision": source.revision})
    except GemmaAwqError as error:
        answers.append({"message": error.message, "hint": error.hint})
json.dump(answers, sys.stdout)
"""


@dataclass(frozen=True)
class Case:
    """A model that cannot be had, and what is said of it. `how`: the connection, one process for each."""

    how: str
    asked: str
    message: str
    hint: str
    revision: str | None = None
    token: str = ""


# What a hub may list beside the files that it has, and a client must not write.
LISTED = {
    "parent": "../evil.json", "deep": "a/../../evil.json", "absolute": "/tmp/evil.json", "backslash": "..\\evil.json",
    "drive": "C:\\evil.json", "nul": "x\0.json", "long": "x" * 300 + ".json", "surrogate": "\ud800.json",
}  # fmt: skip


CASES = [
    Case("online", "org/gated", "org/gated is gated", r"terms at https://huggingface.co/org/gated.*hf auth login"),
    Case("online", "org/private", "does not show org/private without a login", "Check the name.*HF_TOKEN"),
    Case("online", "org/misspelt", "does not show org/misspelt without a login", "Check the name.*HF_TOKEN"),
    Case("online", "org/good", "org/good has no revision 'v9'", "branch, tag or commit", "v9"),
    Case("online", "org/good", f"org/good has no revision '{'0' * 40}'", "branch, tag or commit", "0" * 40),
    Case("online", "org/down", "hub answered HTTP 503 for org/down", "later"),
    Case("online", "org/down", "hub answered HTTP 503 for org/down", "later", "0" * 40),
    Case("online", "org/broken", "hub answered HTTP 500 for org/broken", "later"),
    Case("online", "org/busy", "hub answered HTTP 429 for org/busy", "later"),
    Case("online", "org/forbidden", r"refused access to org/forbidden \(HTTP 403\)", "HF_TOKEN"),
    Case("online", "org/portal", "server that answered for org/portal is not a hub", "HF_ENDPOINT.*proxy"),
    Case("online", "org/cut", "connection to the hub broke off while fetching org/cut", "Run the command again"),
    Case("online", "org/gguf-only", "org/gguf-only has no config.json on the hub", "safetensors"),
    Case("online", "org/two--dashes", "'org/two--dashes' cannot be a hub id", "Check the name"),
    Case("online", "org/model.git", "'org/model.git' cannot be a hub id", "Check the name"),
    Case("online", "org/gated", "org/gated is gated", "terms at https://huggingface.co/org/gated", token=TOKEN),
    Case("online", "org/misspelt", "hub has no repository org/misspelt", "Check the name.*private", token=TOKEN),
    Case("online", "org/good", r"refused access to org/good \(HTTP 401\)", "Check the token.*login", token=STALE),
    Case("online", "org/good", "token contains characters that no token can have", "HF_TOKEN again", token=f"{TOKEN}…"),
    Case("offline", "org/good", "org/good is not in .*cache, and HF_HUB_OFFLINE", "Unset HF_HUB_OFFLINE", token=TOKEN),
    Case(
        "unreachable", "org/good", "org/good is not in .*, and the hub cannot be", "network.*HF_ENDPOINT", token=TOKEN
    ),
    *(
        Case("online", f"org/listed-{name}", f"answer about org/listed-{name} cannot be used", "another repository")
        for name in LISTED
    ),
    Case("online", "org/gone", r"lists a file of org/gone that it does not have \(HTTP 404\)", "another repository"),
    Case(
        "online",
        "org/adapter",
        "org/adapter holds a LoRA adapter of google/gemma-3-1b-it",
        "gemma-awq quantize google/gemma-3-1b-it --adapter org/adapter",
    ),
    Case(
        "online", "here/gemma", r"no folder here/gemma here.* As a hub id: The hub has no", "folder's name", token=TOKEN
    ),
    Case("no cache", "org/good", "org/good cannot be fetched: .*not-a-folder", "permissions.*HF_HOME"),
]

ADAPTER_FILES = ("adapter_model.safetensors", "README.md", "tokenizer.json", "LICENSE")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """What the hub's repositories hold: `main`, an earlier `v1`, and `gguf`."""
    root = tmp_path_factory.mktemp("hub")
    for revision in ("main", "v1"):
        for name in sorted(FETCHED | LEFT):
            file = root / revision / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(WEIGHTS if name.endswith(".safetensors") else f"{name} of {revision}".encode())
    (root / "gguf").mkdir()
    (root / "gguf" / "model-Q4_K_M.gguf").write_bytes(WEIGHTS)
    (root / "adapter").mkdir()
    (root / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "google/gemma-3-1b-it"}')
    for name in (*ADAPTER_FILES, "model.safetensors", "checkpoint-5/adapter_model.safetensors", "optimizer.pt"):
        (root / "adapter" / name).parent.mkdir(exist_ok=True)
        (root / "adapter" / name).write_bytes(WEIGHTS)
    return {folder.name: folder for folder in root.iterdir()}


@pytest.fixture(scope="module")
def hub(folders: Mapping[str, Path]) -> Iterator[HubServer]:
    main = {"main": folders["main"]}
    repos = {
        "org/good": Repo({"main": folders["main"], "v1": folders["v1"]}),
        "org/private": Repo(main, private=True),
        "org/gated": Repo(main, gated=True),
        "org/down": Repo(main, status=503),
        "org/broken": Repo(main, status=500),
        "org/busy": Repo(main, status=429),
        "org/forbidden": Repo(main, status=403),
        "org/portal": Repo(main, page=True),
        "org/cut": Repo(main, cuts=ALWAYS),
        "org/cut-once": Repo(main, cuts=1),
        "org/gguf-only": Repo({"main": folders["gguf"]}),
        "org/adapter": Repo({"main": folders["adapter"]}),
        "org/gone": Repo(main, listed=("./x.json",)),
        **{f"org/listed-{name}": Repo(main, listed=(listed,)) for name, listed in LISTED.items()},
    }
    with hub_server(repos) as server:
        yield server


@pytest.fixture(scope="module")
def nobody() -> Iterator[str]:
    """An endpoint that refuses the connection: its port is taken, and nothing listens on it."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture(scope="module")
def told(hub: HubServer, nobody: str, tmp_path_factory: pytest.TempPathFactory) -> Mapping[Case, dict[str, str]]:
    """Every case's message and hint, from one process for each way of being connected."""
    root = tmp_path_factory.mktemp("homes")
    (root / "not-a-folder").touch()
    (root / "here").mkdir()
    connections: dict[str, dict[str, str]] = {
        "online": {"HF_ENDPOINT": hub.url},
        "offline": {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "1"},
        "unreachable": {"HF_ENDPOINT": nobody},
        "no cache": {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(root / "not-a-folder")},
    }
    answers: dict[Case, dict[str, str]] = {}
    for how, variables in connections.items():
        cases = [case for case in CASES if case.how == how]
        found = ask([(case.asked, case.revision, case.token) for case in cases], root / how, variables)
        answers.update(zip(cases, found, strict=True))
    return answers


def ask(models: Sequence[Asked], home: Path, variables: Mapping[str, str]) -> list[dict[str, Any]]:
    """What `find_source` returns or says of each model, with the hub client's home at `home`. No word of the token."""
    run = subprocess.run(
        [sys.executable, "-c", CLIENT], input=json.dumps(models), env=client_environment(home, variables),
        capture_output=True, text=True, timeout=120, cwd=home.parent,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert TOKEN not in run.stdout + run.stderr
    answers: list[dict[str, Any]] = json.loads(run.stdout)
    return answers


def files_of(folder: str) -> dict[str, bytes]:
    root = Path(folder)
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_an_adapter_arrives_without_what_lies_beside_it(
    hub: HubServer, folders: Mapping[str, Path], tmp_path: Path
) -> None:
    code = (
        "import json, sys\nfrom gemma_awq_cli.models.checkpoints.source import find_adapter\n"
        "found = find_adapter('org/adapter', 'main')\n"
        "print(json.dumps([str(found.folder), found.revision, found.name]))"
    )
    environment = client_environment(tmp_path, {"HF_ENDPOINT": hub.url})
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, timeout=120)
    folder, revision, name = json.loads(done.stdout)
    assert set(files_of(folder)) == {*ADAPTER_FILES, "adapter_config.json"}
    assert (revision, name) == (hub.repos["org/adapter"].commit("main"), "adapter")


@pytest.mark.slow
def test_a_checkpoint_arrives_once_and_without_the_other_formats(
    hub: HubServer, nobody: str, folders: Mapping[str, Path], tmp_path: Path
) -> None:
    hub.requests.clear()
    commit = hub.repos["org/good"].commit("v1")
    latest, tagged, pinned = ask(
        [("org/good", None, ""), ("org/good", "v1", ""), ("org/good", commit, "")], tmp_path, {"HF_ENDPOINT": hub.url}
    )

    for answer, revision in ((latest, "main"), (tagged, "v1"), (pinned, "v1")):
        expected = {name: data for name, data in files_of(str(folders[revision])).items() if name in FETCHED}
        assert files_of(answer["folder"]) == expected
        assert answer["name"] == "good"
    # the report names the commit, however it was asked for
    newest = hub.repos["org/good"].commit("main")
    assert (latest["revision"], tagged["revision"], pinned["revision"]) == (newest, commit, commit)
    fetched = [request.path.split("/", 5)[5] for request in hub.requests if "/resolve/" in request.path]
    assert set(fetched) == FETCHED  # not even their headers were asked for
    transfers = [request for request in hub.requests if request.method == "GET" and "/resolve/" in request.path]
    assert len(transfers) == 2 * len(FETCHED) - 1  # the weights are the same in both

    # what has arrived is enough without the hub
    for variables in ({"HF_ENDPOINT": nobody}, {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "1"}):
        assert ask([("org/good", None, "")], tmp_path, variables) == [latest]


def test_a_login_opens_a_private_repository(hub: HubServer, tmp_path: Path) -> None:
    (answer,) = ask([("org/private", None, TOKEN)], tmp_path, {"HF_ENDPOINT": hub.url})
    assert set(files_of(answer["folder"])) == FETCHED


def test_a_transfer_that_broke_off_is_continued_where_it_stopped(hub: HubServer, tmp_path: Path) -> None:
    hub.requests.clear()
    (answer,) = ask([("org/cut-once", None, "")], tmp_path, {"HF_ENDPOINT": hub.url})
    assert files_of(answer["folder"])["model.safetensors"] == WEIGHTS
    tries = [r.start for r in hub.requests if r.method == "GET" and r.path.endswith(".safetensors")]
    assert tries == [0, len(WEIGHTS) // 2]


def test_half_a_checkpoint_in_the_cache_is_not_taken_for_a_whole_one(hub: HubServer, tmp_path: Path) -> None:
    """The small files arrive, the weights do not: the next run, without the hub, must not open what is there."""
    (cut,) = ask([("org/cut", None, "")], tmp_path, {"HF_ENDPOINT": hub.url})
    assert "broke off" in cut["message"]
    (offline,) = ask([("org/cut", None, "")], tmp_path, {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "1"})
    assert "HF_HUB_OFFLINE is set" in offline["message"]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.how}-{case.message}")
def test_a_model_that_cannot_be_had_is_explained(case: Case, told: Mapping[Case, dict[str, str]]) -> None:
    answer = told[case]
    assert re.search(case.message, answer["message"]), answer
    assert re.search(case.hint, answer["hint"]), answer
    for text in answer.values():
        assert text.endswith(".")
        assert "127.0.0.1" not in text  # the client's own text, addresses and all, stays out


def test_the_command_shows_message_and_hint_without_a_traceback_or_the_token(hub: HubServer, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "gemma_awq_cli", "run", "x", "-m", "org/misspelt"],
        env=client_environment(tmp_path, {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN}),
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 1
    assert run.stdout == ""
    error, hint = run.stderr.splitlines()
    assert error == "error: The hub has no repository org/misspelt."
    assert hint.startswith("hint: Check the name.")


@pytest.mark.parametrize(
    ("asked", "message", "hint"),
    [
        ("gemma", "'gemma' is neither a folder nor a hub id", "google/gemma-3-1b-it"),
        ("google/gemma/3", "'google/gemma/3' is neither", "google/gemma-3-1b-it"),
        ("google/gemma 3", "'google/gemma 3' is neither", "google/gemma-3-1b-it"),
        ("https://huggingface.co/google/gemma-3-1b-it", "is neither a folder nor a hub id", "google/gemma-3-1b-it"),
        ("./no/such/folder", "'./no/such/folder' is neither", "checkpoint folder"),
        ("/no/such", "'/no/such' is neither", "checkpoint folder"),
        ("x" * 300, "cannot be looked up: .*too long", "checkpoint folder"),
        ("org/" + "x" * 300, r"org/x{96}' cannot be a hub id", "Check the name"),
        ("/" + "x/" * 3000, "cannot be looked up: .*too long", "checkpoint folder"),
        ("~no-such-user/model", "cannot be looked up: there is no user no-such-user", "checkpoint folder"),
        ("~no-such-user", "cannot be looked up: there is no user no-such-user", "checkpoint folder"),
        ("a\0b", "holds a NUL character", "checkpoint folder"),
        ("\udcff/model", "neither a folder nor a hub id", "checkpoint folder"),
        ("", "MODEL is empty", "checkpoint folder"),
        (" ", "MODEL is empty", "checkpoint folder"),
        ("a/b.gguf", "neither a folder nor a hub id", "checkpoint folder"),
        ("a/model.safetensors", "neither a folder nor a hub id", "checkpoint folder"),
    ],
    ids=lambda text: repr(text[:20]),
)
def test_what_names_nothing_is_told_what_would(asked: str, message: str, hint: str) -> None:
    with pytest.raises(GemmaAwqError, match=message) as caught:
        find_source(asked, None, pytest.fail)
    assert hint in caught.value.hint


def test_a_local_folder_is_taken_as_it_is_and_named_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its path could be a hub id, and where it is called like the demo."""
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    (tmp_path / "org" / "tiny" / "config.json").write_text("{}")
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for asked, name in (("org/tiny", "tiny"), (str(tmp_path / "org" / "tiny"), "tiny"), ("./demo", "demo")):
        source = find_source(asked, None, pytest.fail)
        assert source.folder.resolve() == tmp_path / asked
        assert (source.asked, source.name, source.revision) == (asked, name, None)


def test_a_file_or_a_folder_without_a_config_is_no_checkpoint(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(WEIGHTS)
    with pytest.raises(GemmaAwqError, match=r"model\.safetensors is a file") as caught:
        find_source(str(weights), None, pytest.fail)
    assert "folder that holds the checkpoint" in caught.value.hint
    with pytest.raises(GemmaAwqError, match=r"has no config\.json") as caught:
        find_source(str(tmp_path), None, pytest.fail)
    assert "Copy config.json" in caught.value.hint
    weights.unlink()
    with pytest.raises(GemmaAwqError, match=r"has no config\.json") as caught:
        find_source(str(tmp_path), None, pytest.fail)
    assert "Hugging Face checkpoint" in caught.value.hint


@pytest.mark.parametrize(
    ("files", "asked", "message", "hint"),
    [
        (
            ["adapter_config.json", "adapter_model.safetensors"],
            "",
            "holds a LoRA adapter, not a whole model",
            "gemma-awq quantize BASE --adapter {root}",
        ),
        (["config.json", "adapter_config.json"], "config.json", r"config\.json is a file", "{root}"),
        (["gemma.Q4_K_M.gguf"], "", r"no config\.json; it holds gemma\.Q4_K_M\.gguf", "GGUF is not supported"),
        (["gemma.GGUF"], "gemma.GGUF", "is a file", "GGUF is not supported"),
        (["pytorch_model.bin"], "", r"no config\.json", "Copy config.json"),
        (["checkpoint-5/config.json"], "", r"checkpoint-5 has one", "{root}/checkpoint-5"),
        (["snapshots/abc/config.json", "refs/main"], "", r"snapshots/abc has one", "{root}/snapshots/abc"),
    ],
)
def test_what_is_no_checkpoint_is_told_what_it_is(
    tmp_path: Path, files: list[str], asked: str, message: str, hint: str
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    with pytest.raises(GemmaAwqError, match=message) as caught:
        find_source(str(tmp_path / asked), None, pytest.fail)
    assert hint.format(root=tmp_path) in caught.value.hint


@pytest.mark.parametrize(
    ("files", "message", "hint"),
    [
        (["pytorch_model.bin"], r"it holds pytorch_model\.bin", "save_pretrained"),
        (["gemma.gguf"], r"it holds gemma\.gguf", "GGUF is not supported"),
        (["adapter_config.json", "adapter_model.safetensors"], "holds a LoRA adapter", "quantize BASE --adapter"),
        ([], "no model.safetensors and no model.safetensors.index.json", "Copy the weights"),
    ],
)
def test_a_config_without_weights_is_told_what_is_there(
    tmp_path: Path, files: list[str], message: str, hint: str
) -> None:
    for name in files:
        (tmp_path / name).touch()
    (tmp_path / "config.json").write_text('{"model_type": "gemma3_text"}')
    with pytest.raises(GemmaAwqError, match=message) as caught:
        Checkpoint(find_source(str(tmp_path), None, pytest.fail).folder)
    assert hint in caught.value.hint


def test_a_misspelt_folder_is_told_what_lies_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "gemma-3-1b-it").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for asked in ("./models/gemma-3-1b-itt", "models/../models/gemma-3-1b", str(tmp_path / "models/gema-3-1b-it")):
        with pytest.raises(GemmaAwqError, match=r"did you mean .*models/.*gemma-3-1b-it\?") as caught:
            find_source(asked, None, pytest.fail)
        assert "network" not in caught.value.hint


def test_a_cache_in_the_home_of_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMMA_AWQ_CACHE", "~no-such-user/cache")
    with pytest.raises(GemmaAwqError, match="~no-such-user/cache: there is no such user") as caught:
        find_source("demo", None, pytest.fail)
    assert "GEMMA_AWQ_CACHE" in caught.value.hint


@pytest.mark.parametrize("make", ["a link to nothing", "a loop", "a pipe", "a device"])
def test_what_is_no_folder(tmp_path: Path, make: str) -> None:
    path = tmp_path / "model"
    if make == "a pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"a loop": "model", "a device": "/dev/null"}.get(make, "nothing"))
    with pytest.raises(GemmaAwqError, match=r"model (cannot be looked up|is a file)") as caught:
        find_source(str(path), None, pytest.fail)
    assert caught.value.hint


@pytest.mark.parametrize("asked", ["folder", "demo"])
def test_a_revision_of_what_has_none_is_wrong_usage(asked: str, tmp_path: Path) -> None:
    model = str(tmp_path) if asked == "folder" else asked
    with pytest.raises(UsageError, match="--revision only applies to a hub id") as caught:
        find_source(model, "v1", pytest.fail)
    assert caught.value.exit_code == 2
