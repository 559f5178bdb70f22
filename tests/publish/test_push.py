"""`gemma-awq push` against a hub on localhost, with the real client: what arrives, what is refused, what goes wrong."""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http

from gemma_awq_cli.cli.app import main
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.events import Note
from gemma_awq_cli.publish.events import Event, UploadStarted
from gemma_awq_cli.publish.push import PushRequest
from gemma_awq_cli.publish.push import push as push_artifact
from gemma_awq_cli.publish.upload_plan import UploadPlan
from tests.tiny import make_gemma_tokenizer
from tests.writing_hub import READ_TOKEN, TOKEN, Fault, WritingHub, writing_hub

Capture = pytest.CaptureFixture[str]
REPO = "me/tiny-AWQ"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own, of LFS uploads
SAID = ("--base-model", "org/tiny", "--license", "gemma", "--device", "cpu")


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client in this process: logged in, large files by LFS, no waiting between tries."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf-cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda _: None, time=time.time))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, client: None) -> Iterator[WritingHub]:
    with writing_hub(tmp_path / "hub") as server:
        point_to(server.url, monkeypatch)
        yield server


def point_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As HF_ENDPOINT does when the client is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def artifact(artifacts: Callable[[str], Path], tmp_path: Path) -> Path:
    """An artifact of one's own, to be damaged."""
    return Path(shutil.copytree(artifacts("gemma"), tmp_path / "artifact"))


def push(folder: Path, *more: str, repo: str = REPO) -> int:
    return main(["push", repo, str(folder), "--yes", *SAID, *more])


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def steps(hub: WritingHub) -> list[str]:
    return [seen.step for seen in hub.seen]


def test_the_artifact_arrives_whole_and_a_second_push_sends_nothing(
    hub: WritingHub, artifacts: Callable[[str], Path], capsys: Capture
) -> None:
    folder = artifacts("gemma2")
    capsys.readouterr()
    hub.page, hub.part = 3, 20_000  # several pages, several parts
    assert push(folder) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{hub.url}/{REPO}\n"
    assert "Everyone will be able to read it" in captured.err
    tree = hub.tree(REPO)
    made = {"README.md", "Notice", "GEMMA_TERMS_OF_USE.md", "provenance.json", "quantization_report.json"}
    assert set(tree) == {path.name for path in folder.iterdir()} | made | {".gitattributes"}
    for path in folder.iterdir():
        if path.name not in made:
            assert hub.read(REPO, path.name) == path.read_bytes()
    assert tree["model.safetensors"]["lfs"] == sha256((folder / "model.safetensors").read_bytes())
    assert steps(hub).count("put") == -(-(folder / "model.safetensors").stat().st_size // 20_000)
    assert b"Gemma is provided under and subject to the Gemma Terms of Use found at" in hub.read(REPO, "Notice")
    assert TOKEN not in captured.err

    head = hub.repos[REPO]["refs"]["main"]
    hub.seen.clear()
    assert push(folder) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{hub.url}/{REPO}\n"
    assert "Nothing had to be sent" in captured.err
    assert {"put", "commit", "create", "batch"}.isdisjoint(steps(hub))
    assert hub.repos[REPO]["refs"]["main"] == head


def test_push_is_one_call_that_reports_events(hub: WritingHub, artifact: Path) -> None:
    request = PushRequest(artifact, REPO, base_model="org/tiny", licence="gemma", message="as asked")
    events: list[Event] = []
    with pytest.raises(GemmaAwqError, match="Nothing was pushed"):
        push_artifact(request, events.append, lambda _: False)
    assert hub.repos == {}
    assert UploadStarted() not in events
    plans: list[UploadPlan] = []
    pushed = push_artifact(request, events.append, lambda plan: plans.append(plan) or True)
    assert pushed.url == f"{hub.url}/{REPO}"
    assert pushed.commit == hub.repos[REPO]["refs"]["main"]
    assert pushed.verified == len(pushed.prepared.files) == len(plans[0].sent)
    assert events[-1] == UploadStarted()
    assert Note(f"Checking {artifact}.") in events
    # what is on the hub already needs nobody's consent
    again = push_artifact(request, events.append, lambda _: False)
    assert again.commit == pushed.commit
    assert again.plan.sent == ()
    assert events.count(UploadStarted()) == 1


def test_only_what_changed_is_sent(hub: WritingHub, artifact: Path, capsys: Capture) -> None:
    assert push(artifact) == 0
    capsys.readouterr()
    (artifact / "generation_config.json").write_text('{"eos_token_id": 1, "do_sample": true}')
    hub.seen.clear()
    assert push(artifact, "--json", "--message", "sampling by default") == 0
    document = json.loads(capsys.readouterr().out)
    assert [file["name"] for file in document["files"]] == ["generation_config.json", "provenance.json"]
    assert document["commit"] == hub.repos[REPO]["refs"]["main"]
    assert document["verified"] == len(hub.tree(REPO)) - 1  # all but .gitattributes
    assert "put" not in steps(hub)


@pytest.mark.slow
def test_what_was_pushed_runs_and_is_downloaded_by_the_hubs_own_command(
    hub: WritingHub, artifacts: Callable[[str], Path], tmp_path: Path, capsys: Capture
) -> None:
    """All in processes of their own that know of the hub by HF_ENDPOINT alone."""
    folder = artifacts("gemma3_text")
    capsys.readouterr()
    environment = {
        **os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip

    def run(*words: str) -> str:
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        assert TOKEN not in done.stdout + done.stderr
        return done.stdout

    completion = ["run", "Hello", "--max-new-tokens", "5", "--device", "cpu", "--json", "-m"]
    commands = [["push", REPO, str(folder), "--yes", "--private", *SAID], [*completion, REPO]]
    code = "import sys\nfrom gemma_awq_cli.cli.app import main\n"
    url, _, there = run(sys.executable, "-c", code + f"sys.exit(sum(map(main, {commands!r})))").partition("\n")
    assert url == f"{hub.url}/{REPO}"
    assert hub.repos[REPO]["private"] is True
    assert main([*completion, str(folder)]) == 0
    assert json.loads(there)["text"] == json.loads(capsys.readouterr().out)["text"]
    run(str(Path(sys.executable).parent / "hf"), "download", REPO, "--local-dir", str(tmp_path / "back"))
    for path in folder.iterdir():
        if path.name != "quantization_report.json":
            assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()
    # what came down is an artifact that can go up again
    assert push(tmp_path / "back", "--dry-run") == 0


@dataclass(frozen=True)
class Case:
    step: str
    status: int
    message: str
    hint: str


CASES = [
    Case("info", 401, r"does not accept this login for me/tiny-AWQ \(HTTP 401\)", "hf auth login"),
    Case("info", 500, "hub answered HTTP 500 for me/tiny-AWQ", "Try later"),
    Case("create", 403, r"may not write to me/tiny-AWQ \(HTTP 403\)", "organization of your own"),
    Case("create", 401, r"does not accept this login", "HF_TOKEN"),
    Case("preupload", 404, "hub answered HTTP 404", "again"),
    Case("batch", 413, r"larger than me/tiny-AWQ accepts \(HTTP 413\)", "limits"),
    Case("put", 403, r"may not write to me/tiny-AWQ \(HTTP 403\)", "token that can write"),
    Case("put", 503, "hub answered HTTP 503", "not sent a second time"),
    Case("put", 429, "hub answered HTTP 429", "not sent a second time"),
    Case("verify", 500, "hub answered HTTP 500", "not sent a second time"),
    Case(
        "commit", 409, r"Someone else changed me/tiny-AWQ in the meantime \(HTTP 409\)", "Look at what changed on main"
    ),
    Case("commit", 413, r"HTTP 413", "limits"),
    Case("commit", 400, r"did not accept the request", "REPO_ID"),
    Case("commit", 429, "HTTP 429", "Try later"),
    Case("commit", 502, "HTTP 502", "Try later"),
    Case("tree", 500, "HTTP 500", "Try later"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.step}-{case.status}")
def test_a_refusal_is_explained_and_the_next_push_goes_through(
    case: Case, hub: WritingHub, artifact: Path, capsys: Capture
) -> None:
    if case.step == "tree":
        hub.create(REPO)
    hub.faults = [Fault(case.step, status=case.status)]
    assert push(artifact) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.search(case.message, captured.err), captured.err
    assert re.search(case.hint, captured.err.split("hint: ")[1]), captured.err
    for secret in (TOKEN, "127.0.0.1", "Traceback"):
        assert secret not in captured.err
    assert hub.repos.get(REPO) is None or "README.md" not in hub.tree(REPO)  # nothing half published
    hub.faults = []
    assert push(artifact) == 0


def test_a_connection_that_breaks_off_is_tried_again_and_what_arrived_is_not_sent_twice(
    hub: WritingHub, artifact: Path, capsys: Capture
) -> None:
    hub.faults = [Fault("put", cut=10_000, times=2)]
    assert push(artifact) == 0
    assert [seen.status for seen in hub.seen if seen.step == "put"] == [0, 0, 200]
    # for good, in the commit: the objects are there already when it is tried again
    hub.faults = [Fault("commit", cut=1)]
    assert push(artifact, repo="me/other") == 1
    captured = capsys.readouterr()
    assert "broke off while pushing to me/other" in captured.err
    assert "not sent a second time" in captured.err
    hub.faults, hub.seen[:] = [], []
    assert push(artifact, repo="me/other") == 0
    assert "put" not in steps(hub)


def test_a_slow_connection_is_waited_for(hub: WritingHub, artifact: Path) -> None:
    hub.faults = [Fault("put", slow=0.3)]
    assert push(artifact) == 0
    assert hub.read(REPO, "model.safetensors") == (artifact / "model.safetensors").read_bytes()


def test_no_hub_at_all(artifact: Path, client: None, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    point_to("http://127.0.0.1:9", monkeypatch)
    assert push(artifact) == 1
    assert "The hub cannot be reached" in capsys.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert push(artifact) == 1
    assert "Unset HF_HUB_OFFLINE" in capsys.readouterr().err


def start_hub(root: Path, port: int, *more: str) -> tuple["subprocess.Popen[str]", str]:
    words = [sys.executable, "-m", "tests.writing_hub", str(root), "--port", str(port), *more]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


@pytest.mark.slow
def test_a_hub_that_dies_in_the_middle(
    artifact: Path, client: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Two large files: the first has arrived when the hub is killed in the second, and is not sent again."""
    size = (artifact / "model.safetensors").stat().st_size
    with (artifact / "tokenizer.json").open("a") as file:
        file.write(" " * (11_000_000))  # large enough to go by LFS, and for the hub to read it in pieces
    process, url = start_hub(tmp_path / "hub", 0, "--die-after", str(size + 5_000_000))
    point_to(url, monkeypatch)
    assert push(artifact) == 1
    assert process.wait() == -signal.SIGKILL
    assert "hub" in capsys.readouterr().err
    objects = [path for path in (tmp_path / "hub" / "objects").iterdir() if path.suffix != ".partial"]
    assert [path.stat().st_size for path in objects] == [size]
    assert "README.md" not in WritingHub(tmp_path / "hub").tree(REPO)
    with writing_hub(tmp_path / "hub") as hub:
        point_to(hub.url, monkeypatch)
        assert push(artifact) == 0
        assert hub.received() == (artifact / "tokenizer.json").stat().st_size


def test_an_interrupted_push_says_that_it_can_be_repeated(
    hub: WritingHub, artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    from huggingface_hub import HfApi

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(HfApi, "create_commit", interrupted)
    assert push(artifact) == 130
    assert "Run the command again to go on" in capsys.readouterr().err


def test_a_branch_that_moved_meanwhile_is_not_overwritten(
    hub: WritingHub, artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    from huggingface_hub import HfApi

    hub.create(REPO)
    create_commit = HfApi.create_commit

    def late(*arguments: Any, **more: Any) -> object:
        hub.edit(REPO, {"config.json": b"someone else's"})
        return create_commit(*arguments, **more)

    monkeypatch.setattr(HfApi, "create_commit", late)
    assert push(artifact) == 1
    assert (
        "Someone else changed me/tiny-AWQ in the meantime (HTTP 412), so nothing was committed"
        in capsys.readouterr().err
    )
    assert hub.read(REPO, "config.json") == b"someone else's"


def test_what_the_hub_stores_otherwise_is_found_out(hub: WritingHub, artifact: Path, capsys: Capture) -> None:
    hub.corrupted = "config.json"
    assert push(artifact) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "does not hold what was sent: config.json" in captured.err


def test_a_card_that_was_edited_on_the_hub_is_kept(hub: WritingHub, artifact: Path, capsys: Capture) -> None:
    assert push(artifact) == 0
    generated = hub.read(REPO, "README.md")
    hub.edit(REPO, {"README.md": generated.replace(b"## Use", b"## How I use it"), "picture.png": b"\0"})
    capsys.readouterr()
    assert push(artifact) == 0
    assert "edited by hand and is kept" in capsys.readouterr().err
    assert b"How I use it" in hub.read(REPO, "README.md")
    assert push(artifact, "--replace-card") == 0
    assert hub.read(REPO, "README.md") == generated
    assert hub.read(REPO, "picture.png") == b"\0"


def test_a_pull_request_leaves_the_branch_alone(hub: WritingHub, artifact: Path, capsys: Capture) -> None:
    assert push(artifact, "--create-pr") == 1
    assert "has no main to propose changes to" in capsys.readouterr().err
    hub.create("someone/model")  # where this login may not write
    assert push(artifact, "--create-pr", repo="someone/model") == 0
    captured = capsys.readouterr()
    assert captured.out == f"{hub.url}/someone/model/discussions/1\n"
    assert "--revision refs/pr/1" in captured.err
    assert set(hub.tree("someone/model")) == {".gitattributes"}
    assert hub.read("someone/model", "config.json", "refs/pr/1") == (artifact / "config.json").read_bytes()


def test_a_new_branch_and_a_pull_requests_branch(hub: WritingHub, artifact: Path, capsys: Capture) -> None:
    assert push(artifact, "--revision", "group/32") == 0
    assert capsys.readouterr().out == f"{hub.url}/{REPO}/tree/group%2F32\n"
    assert set(hub.tree(REPO)) == {".gitattributes"}
    assert hub.read(REPO, "config.json", "group/32") == (artifact / "config.json").read_bytes()
    assert push(artifact, "--revision", "refs/pr/7") == 1
    assert "has no revision 'refs/pr/7'" in capsys.readouterr().err


def test_another_model_is_not_replaced_and_older_weights_do_not_stay(
    hub: WritingHub, artifact: Path, capsys: Capture
) -> None:
    hub.create(REPO)
    hub.edit(REPO, {"model-00001-of-00002.safetensors": b"theirs"})
    assert push(artifact) == 1
    assert "already holds another model (model-00001-of-00002.safetensors" in capsys.readouterr().err
    hub.edit(REPO, {"quantization_report.json": b"{}", "model.safetensors.index.json": b"{}", "plot.png": b"x"})
    assert push(artifact) == 0
    assert "belongs to an earlier artifact and will be removed" in capsys.readouterr().err
    assert {"model-00001-of-00002.safetensors", "model.safetensors.index.json"}.isdisjoint(hub.tree(REPO))
    assert "plot.png" in hub.tree(REPO)


def test_private_is_private(hub: WritingHub, artifact: Path, capsys: Capture) -> None:
    hub.create(REPO)
    assert push(artifact, "--private") == 1
    assert "is public, and --private does not change that" in capsys.readouterr().err
    assert push(artifact, "--private", repo="me/secret") == 0
    assert hub.repos["me/secret"]["private"] is True
    assert "Everyone" not in capsys.readouterr().err
    assert push(artifact, repo="me/secret") == 0


@pytest.mark.parametrize(
    ("token", "repo", "message", "hint"),
    [
        ("", REPO, "not logged in to the hub", "hf auth login"),
        (READ_TOKEN, REPO, "may not write to me/tiny-AWQ", "token that can write"),
        (TOKEN, "someone/tiny", "may not write to someone/tiny", "--create-pr"),
        ("hf_expired" + "y" * 30, REPO, "does not accept this login", "hf auth login"),
        (f"{TOKEN}…", REPO, "token contains characters that no token can have", "HF_TOKEN again"),
    ],
)
def test_a_login_that_does_not_do(
    token: str, repo: str, message: str, hint: str, hub: WritingHub, artifact: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: Capture,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_TOKEN", token)
    assert push(artifact, repo=repo) == 1
    captured = capsys.readouterr()
    assert re.search(message, captured.err), captured.err
    assert re.search(hint, captured.err), captured.err
    assert not token or token not in captured.out + captured.err
    assert hub.repos == {}


@pytest.mark.parametrize("repo", ["tiny", "a/b/c", "me/ti ny", "https://huggingface.co/me/tiny", "me/a--b", "me/x.git"])
def test_a_name_that_no_repository_has(repo: str, hub: WritingHub, artifact: Path, capsys: Capture) -> None:
    assert push(artifact, repo=repo) == 1
    assert re.search(r"Invalid repository id|cannot be a hub id", capsys.readouterr().err)
    assert hub.repos == {}


def test_a_dry_run_needs_neither_hub_nor_login(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    arguments = ["push", REPO, str(artifact), "--dry-run", *SAID]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("---\nbase_model: org/tiny\n")
    for path in artifact.iterdir():
        assert path.name in captured.err
    assert "10 files" in captured.err
    assert main([*arguments, "--json", "--private"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert f"{document['card'].rstrip()}\n" == captured.out
    sizes = {file["name"]: file["bytes"] for file in document["files"]}
    assert sizes["model.safetensors"] == (artifact / "model.safetensors").stat().st_size
    assert document["license"] == {"license": "gemma"}


def test_nobody_is_asked_without_a_terminal_and_no_is_no(
    hub: WritingHub, artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    import io

    assert main(["push", REPO, str(artifact), *SAID]) == 2
    assert "push with --yes" in capsys.readouterr().err

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal("n\n"))
    assert main(["push", REPO, str(artifact), *SAID]) == 1
    assert "Nothing was pushed" in capsys.readouterr().err
    assert hub.repos == {}
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    assert main(["push", REPO, str(artifact), *SAID]) == 0


def test_the_last_artifact_is_the_default(artifact: Path, capsys: Capture) -> None:
    from gemma_awq_cli.models.checkpoints.cache import remember_artifact

    assert main(["push", REPO, "--dry-run", *SAID]) == 1
    assert "No artifact is given and none was quantized yet" in capsys.readouterr().err
    remember_artifact(artifact)
    assert main(["push", REPO, "--dry-run", *SAID]) == 0
    assert "(the last artifact)" in capsys.readouterr().err


def test_what_a_system_left_there_is_named_and_not_sent(hub: WritingHub, artifact: Path, capsys: Capture) -> None:
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._model.safetensors"):
        (artifact / name).write_text("x")
    assert push(artifact) == 0
    said = capsys.readouterr().err
    assert (
        "Not sent, because the operating system left it there: .DS_Store, ._model.safetensors, Thumbs.db, desktop.ini"
        in said
    )
    assert not {".DS_Store", "Thumbs.db", "desktop.ini", "._model.safetensors"} & set(hub.tree(REPO))


def test_no_place_of_this_machine_gets_there(hub: WritingHub, artifact: Path, capsys: Capture) -> None:
    """Of an artifact whose files were copied as they were, and whose report was made in a folder of this machine."""
    config = json.loads((artifact / "tokenizer_config.json").read_text())
    (artifact / "tokenizer_config.json").write_text(json.dumps({**config, "name_or_path": "/home/ann/private/gemma"}))
    report = json.loads((artifact / "quantization_report.json").read_text())
    report["arguments"]["text_column"] = report["fingerprint"]["x"] = "/home/ann/private"
    report["run"]["machine"] = "made in /home/ann/private"
    (artifact / "quantization_report.json").write_text(json.dumps(report))
    assert push(artifact) == 0
    assert "tokenizer_config.json is sent without the local paths that it names in name_or_path" in (
        capsys.readouterr().err
    )
    for name in hub.tree(REPO):
        content = hub.read(REPO, name)
        assert b"/home/ann" not in content, name
        assert str(artifact.parent).encode() not in content, name
    assert json.loads(hub.read(REPO, "tokenizer_config.json"))["name_or_path"] == "gemma"


def test_a_secret_in_any_file_stops_it_before_the_hub_is_asked(
    hub: WritingHub, artifact: Path, capsys: Capture
) -> None:
    secret = f"hf_{'q' * 34}"
    for name, content in (
        ("LICENSE", f"MIT\n{secret}\n"),
        ("chat_template.jinja", f"{{# {secret} #}}{{{{ messages }}}}"),
        (
            "quantization_report.json",
            (artifact / "quantization_report.json").read_text().replace('"cpu"', f'"{secret}"'),
        ),
    ):
        folder = Path(shutil.copytree(artifact, artifact.parent / name))
        (folder / name).write_text(content)
        assert push(folder) == 1
        captured = capsys.readouterr()
        assert "holds what looks like a Hugging Face token" in captured.err
        assert secret not in captured.out + captured.err
    assert hub.seen == []


@pytest.mark.parametrize(
    "path", ["../x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", "x\x1b[31m.safetensors", ""]
)
def test_a_hub_that_lists_names_that_lead_elsewhere(
    path: str, hub: WritingHub, artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    def listed(*_: object, **__: object) -> list[RepoFile]:
        return [RepoFile(path=path, size=1, oid="0" * 40)]

    hub.create(REPO)
    monkeypatch.setattr(HfApi, "list_repo_tree", listed)
    assert push(artifact) == 1
    assert "under an invalid name" in capsys.readouterr().err


def test_what_answers_is_no_hub(
    hub: WritingHub, artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    def listed(*_: object, **__: object) -> list[RepoFile]:
        return [RepoFile(path="x")]

    hub.create(REPO)
    monkeypatch.setattr(HfApi, "list_repo_tree", listed)
    assert push(artifact) == 1
    assert "is not a hub" in capsys.readouterr().err


@pytest.fixture
def gemma(artifact: Path) -> Path:
    """An artifact with a tokenizer of Gemma's kind, which GGUF has a form for."""
    make_gemma_tokenizer(artifact)
    return artifact


def gguf_of(folder: Path) -> dict[str, bytes]:
    """The files of the export that a push leaves beside an artifact."""
    written = folder.with_name(f"{folder.name}-gguf")
    return {
        path.name: path.read_bytes() for path in written.iterdir() if path.suffix == ".gguf" or path.name == "Modelfile"
    }


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="gguf is not installed")
def test_gguf_beside_the_artifact(hub: WritingHub, gemma: Path, capsys: Capture) -> None:
    assert push(gemma, "--formats", "awq,gguf") == 0
    exported = gguf_of(gemma)
    assert sorted(exported) == ["Modelfile", "artifact-Q5_0.gguf"]
    for name, content in exported.items():
        assert hub.read(REPO, name) == content
    card = hub.read(REPO, "README.md").decode()
    assert "model.safetensors, config.json and artifact-Q5_0.gguf were modified" in card
    assert f"llama-cli -hf {REPO}" in card
    assert "\n- gguf\n" in card
    capsys.readouterr()
    assert push(gemma, "--formats", "awq,gguf") == 0
    assert "Nothing had to be sent" in capsys.readouterr().err
    # a GGUF of other weights does not stay
    hub.edit(REPO, {"old-Q5_0.gguf": b"GGUF"})
    assert push(gemma, "--formats", "awq,gguf") == 0
    assert "old-Q5_0.gguf" not in hub.tree(REPO)


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="gguf is not installed")
def test_gguf_in_a_repository_of_its_own(hub: WritingHub, gemma: Path, capsys: Capture) -> None:
    assert push(gemma, "--formats", "gguf", repo="me/tiny-GGUF") == 0
    tree = set(hub.tree("me/tiny-GGUF"))
    licence = {"Notice", "GEMMA_TERMS_OF_USE.md"}
    assert tree == {"README.md", ".gitattributes", "Modelfile", "artifact-Q5_0.gguf", *licence}
    card = hub.read("me/tiny-GGUF", "README.md").decode()
    assert "artifact-Q5_0.gguf was modified from org/tiny" in card
    assert "library_name: gguf" in card
    assert "ollama run hf.co/me/tiny-GGUF" in card
    assert push(gemma) == 0
    capsys.readouterr()
    assert push(gemma, "--formats", "gguf") == 1  # would take the artifact away
    assert "Push both with --formats awq,gguf" in capsys.readouterr().err


@pytest.mark.parametrize("formats", [",", "gguf,gguf", "mlx", "awq,onnx"])
def test_formats_that_do_not_exist(formats: str, artifact: Path, capsys: Capture) -> None:
    assert push(artifact, "--formats", formats) == 2
    assert "Give one or both of awq, gguf." in capsys.readouterr().err
