"""`list`, `show` and `rm`: what is found, and that nothing but this tool's own files ever goes."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from gemma_awq_cli.cli.app import main
from gemma_awq_cli.models.checkpoints.cache import last_artifact, remember_artifact, remember_folder, remembered_folders
from gemma_awq_cli.system.locking import Lock
from tests.conftest import make_cache, quantize_arguments

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, with a cache of its own."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("GEMMA_AWQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return folder


@pytest.fixture
def artifact(here: Path, artifacts: Callable[[str], Path]) -> Path:
    shutil.copytree(artifacts("gemma3"), here / "my-awq")
    return here / "my-awq"


def _entries(capsys: Capture, *arguments: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["list", "--json", *arguments]) == 0
    entries: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["entries"]
    return entries


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def _unfinished(folder: Path) -> Path:
    left = folder / ".new.partial"
    for part in ("model", "state"):
        (left / part).mkdir(parents=True)
        (left / part / "file").write_bytes(b"12345")
    (left / "lock").touch()
    return left


# --- list and show


def test_everything_is_listed_with_its_size(
    artifact: Path, tmp_path: Path, checkpoints: Callable[[str], Path], capsys: Capture
) -> None:
    assert main(["export", "my-awq", "--to", "bf16", "-o", "dense"]) == 0
    _unfinished(artifact.parent)
    cache, hub = tmp_path / "cache", tmp_path / "hub"
    for part in ("native", "own-rows", "models/gemma-3-270m"):
        (cache / part).mkdir(parents=True)
        (cache / part / "file").write_bytes(b"x" * 7)
    snapshot = hub / "models--org--gemma" / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    blobs = hub / "models--org--gemma" / "blobs"
    blobs.mkdir()
    (blobs / "abcd").write_bytes((checkpoints("gemma3") / "config.json").read_bytes())
    (snapshot / "config.json").symlink_to("../../blobs/abcd")
    other = hub / "models--org--llama" / "snapshots" / "1234"
    other.mkdir(parents=True)
    (other / "config.json").write_text('{"model_type": "llama"}')
    (artifact.parent / "notes").mkdir()

    found = {entry["name"]: entry for entry in _entries(capsys)}
    assert {name: entry["kind"] for name, entry in found.items()} == {
        f".{os.sep}.new.partial": "unfinished", f".{os.sep}dense": "export", f".{os.sep}my-awq": "artifact",
        "cache:native": "cache", "cache:own-rows": "cache", "cache:gemma-3-270m": "cache", "org/gemma": "hub",
    }  # fmt: skip
    assert found[f".{os.sep}my-awq"]["bytes"] == _size(artifact)
    assert found[f".{os.sep}dense"]["bytes"] == _size(artifact.parent / "dense")
    assert found["org/gemma"]["bytes"] == (blobs / "abcd").stat().st_size, "a link has no size of its own"
    report = json.loads((artifact / "quantization_report.json").read_text())
    assert found[f".{os.sep}my-awq"]["facts"]["kl"] == report["fidelity"]["kl"]

    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in found)
    assert [entry["kind"] for entry in _entries(capsys, "my-awq")] == ["artifact"]
    assert len(_entries(capsys, ".")) == 3


def test_what_was_written_elsewhere_is_remembered(
    here: Path, checkpoints: Callable[[str], Path], text_file: Path, tmp_path: Path, native_folder: Path,
    capsys: Capture,
) -> None:  # fmt: skip
    make_cache(tmp_path / "cache", native_folder)
    assert main(quantize_arguments(checkpoints("gemma"), tmp_path / "far" / "one", text_file)) == 0
    assert main(["export", str(tmp_path / "far" / "one"), "--to", "bf16", "-o", str(tmp_path / "far" / "two")]) == 0
    assert last_artifact() == tmp_path / "far" / "one", "an export is not the next default model"
    found = [entry for entry in _entries(capsys) if entry["kind"] != "cache"]  # which quantizing may compile
    assert [entry["path"] for entry in found] == [str(tmp_path / "far" / "two"), str(tmp_path / "far" / "one")]
    shutil.rmtree(tmp_path / "far" / "two")
    assert [entry["kind"] for entry in _entries(capsys) if entry["kind"] != "cache"] == ["artifact"]


def test_the_memory_is_bounded_and_keeps_the_latest(here: Path, tmp_path: Path) -> None:
    for number in range(130):
        assert remember_folder(tmp_path / f"{number}") is None
    assert remember_artifact(tmp_path / "5") is None
    folders = remembered_folders()
    assert len(folders) == 100
    assert folders[:2] == [tmp_path / "5", tmp_path / "129"]
    for number in range(30):  # 3000 bytes each
        assert remember_folder(tmp_path.joinpath(*["\u00e4" * 100] * 5, str(number))) is None
    assert last_artifact() == tmp_path / "5"
    assert remembered_folders()[0].name == "29"


def test_an_empty_place(here: Path, capsys: Capture) -> None:
    assert main(["list"]) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "There is nothing here." in shown.err
    assert _entries(capsys) == []
    assert main(["list", "nowhere"]) == 1
    assert "nowhere cannot be read" in capsys.readouterr().err


def test_a_damaged_report_is_shown_as_such(artifact: Path, capsys: Capture) -> None:
    (artifact / "quantization_report.json").write_text("{")
    (entry,) = _entries(capsys)
    assert entry["kind"] == "artifact"
    assert "quantization_report.json" in entry["problem"]
    assert main(["show", "my-awq"]) == 0
    assert "quantization_report.json" in capsys.readouterr().out
    assert main(["rm", "my-awq", "--yes"]) == 0
    assert not artifact.exists()


def test_show(artifact: Path, capsys: Capture) -> None:
    assert main(["show", "my-awq", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {file["name"]: file["bytes"] for file in document["files"]} == {
        path.name: path.stat().st_size for path in artifact.iterdir()
    }
    assert document["path"] == str(artifact)
    assert remember_artifact(artifact) is None
    assert main(["show"]) == 0
    shown = capsys.readouterr().out
    assert "model.safetensors" in shown
    assert f"{document['facts']['kl']:.4f}" in shown


@pytest.mark.parametrize("command", ["show", "rm"])
@pytest.mark.parametrize("name", ["nowhere", "cache:native", "cache:", "org/name", "notes"])
def test_a_name_that_is_nothing(command: str, name: str, here: Path, capsys: Capture) -> None:
    (here / "notes").mkdir()
    (here / "notes" / "text").write_text("mine")
    assert main([command, name, *(["--yes"] if command == "rm" else [])]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert (here / "notes" / "text").read_text() == "mine"


def test_a_folder_of_strange_depth_and_date(artifact: Path, capsys: Capture) -> None:
    inner = artifact
    with suppress(OSError):  # longer than a name may be here
        for _ in range(1200):
            inner /= "d"
            inner.mkdir()
    assert len(inner.relative_to(artifact).parts) > 100
    os.utime(artifact / "config.json", (2**36, 2**36))
    assert main(["show", "my-awq"]) == 0
    assert len(_entries(capsys)) == 1
    assert main(["rm", "my-awq", "--yes"]) == 1
    assert "holds what is not this tool's: d, d/d, " in capsys.readouterr().err
    while inner != artifact:  # pytest could not
        inner = inner if inner.is_dir() else inner.parent
        inner.rmdir()
        inner = inner.parent


# --- rm


def test_an_artifact_goes_whole(artifact: Path, capsys: Capture) -> None:
    (artifact / "README.md").write_text("card")
    (artifact / ".DS_Store").write_text("")
    assert main(["rm", "my-awq", "--yes"]) == 0
    assert "Removed my-awq" in capsys.readouterr().err
    assert list(artifact.parent.iterdir()) == []


def test_an_export_goes_by_its_own_list(artifact: Path, capsys: Capture) -> None:
    assert main(["export", "my-awq", "--to", "bf16", "-o", "dense"]) == 0
    dense = artifact.parent / "dense"
    (dense / "README.md").write_text("written by hand")
    assert main(["rm", "dense", "--yes"]) == 1
    assert "holds what is not this tool's: README.md." in capsys.readouterr().err
    (dense / "README.md").unlink()
    assert main(["rm", "dense", "--yes"]) == 0
    assert not dense.exists()


@pytest.mark.parametrize("foreign", ["notes.txt", "weights.bin", ".git/config", "sub/config.json", ".env"])
def test_foreign_files_keep_a_folder(foreign: str, artifact: Path, capsys: Capture) -> None:
    (artifact / foreign).parent.mkdir(exist_ok=True)
    (artifact / foreign).write_text("mine")
    before = _names(artifact)
    assert main(["rm", "my-awq", "--yes"]) == 1
    assert f"holds what is not this tool's: {foreign.partition('/')[0]}" in capsys.readouterr().err
    assert _names(artifact) == before


def test_links_keep_a_folder_and_are_not_followed(artifact: Path, tmp_path: Path, capsys: Capture) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "config.json").write_text("mine")
    for name, target in (("README.md", precious / "config.json"), ("model", precious)):
        (artifact / name).unlink(missing_ok=True)
        (artifact / name).symlink_to(target)
        assert main(["rm", "my-awq", "--yes"]) == 1
        assert f"holds links: {name}." in capsys.readouterr().err
        (artifact / name).unlink()
    (artifact.parent / "link").symlink_to(artifact)
    for name in ("link", f"link{os.sep}"):
        assert main(["rm", name, "--yes"]) == 1
        assert "is a link." in capsys.readouterr().err
    assert (precious / "config.json").read_text() == "mine"
    assert (artifact / "model.safetensors").is_file()


def test_links_in_the_cache_are_not_followed(here: Path, tmp_path: Path, capsys: Capture) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("mine")
    (tmp_path / "cache" / "models").mkdir(parents=True)
    (tmp_path / "cache" / "native").symlink_to(precious)
    (tmp_path / "cache" / "models" / "m").symlink_to(precious)
    assert _entries(capsys) == []
    for name in ("cache:native", "cache:m"):
        assert main(["rm", name, "--yes"]) == 1
    assert (precious / "file").read_text() == "mine"


def test_parts_of_the_cache_go_by_name_or_path(here: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for part in ("native/deep", "own-rows", "models/gemma-3-270m", "models/other"):
        (cache / part).mkdir(parents=True)
        (cache / part / "file").write_bytes(b"x")
    (cache / "chat").write_text("mine")
    assert main(["rm", "cache:native", str(cache / "models" / "gemma-3-270m"), "cache:own-rows", "--yes"]) == 0
    assert _names(cache) == {"models", "models/other", "models/other/file", "chat"}


def test_the_hubs_cache_is_left_to_its_own_tool(
    here: Path, tmp_path: Path, checkpoints: Callable[[str], Path], capsys: Capture
) -> None:
    snapshot = tmp_path / "hub" / "models--org--gemma" / "snapshots" / "1234"
    shutil.copytree(checkpoints("gemma3"), snapshot)
    before = _names(tmp_path / "hub")
    assert main(["show", "org/gemma"]) == 0
    assert main(["rm", "org/gemma", "--yes"]) == 1
    assert "hf cache rm model/org/gemma" in capsys.readouterr().err
    assert _names(tmp_path / "hub") == before


def test_nothing_goes_if_one_of_several_must_stay(artifact: Path, artifacts: Callable[[str], Path]) -> None:
    shutil.copytree(artifacts("gemma3"), artifact.parent / "second")
    (artifact.parent / "second" / "mine").touch()
    assert main(["rm", "my-awq", "second", "--yes"]) == 1
    assert (artifact / "model.safetensors").is_file()


def test_unfinished_work_goes_unless_somebody_writes_it(artifact: Path, capsys: Capture) -> None:
    left = _unfinished(artifact.parent)
    lock = Lock(left / "lock")
    assert lock.acquire()
    assert main(["rm", ".new.partial", "--yes"]) == 1
    assert "Another process is writing .new.partial." in capsys.readouterr().err
    assert (left / "state" / "file").is_file()
    lock.release()
    assert main(["rm", ".new.partial", "--yes"]) == 0
    assert not left.exists()


def test_an_artifact_that_is_being_replaced_stays(artifact: Path, capsys: Capture) -> None:
    partial = artifact.parent / ".my-awq.partial"
    partial.mkdir()
    lock = Lock(partial / "lock")
    assert lock.acquire()
    assert main(["rm", "my-awq", "--yes"]) == 1
    assert "Another process is writing my-awq." in capsys.readouterr().err
    lock.release()
    assert (artifact / "model.safetensors").is_file()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells which files are mapped")
def test_what_a_process_has_loaded_stays(artifact: Path, capsys: Capture) -> None:
    code = (
        "import mmap, sys\n"
        "file = open(sys.argv[1], 'rb')\n"
        "mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(artifact / "model.safetensors")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == b"ready\n"
        assert main(["rm", "my-awq", "--yes"]) == 1
        assert f"Process {reader.pid} is using my-awq." in capsys.readouterr().err
        assert (artifact / "model.safetensors").is_file()
    assert main(["rm", "my-awq", "--yes"]) == 0


def test_what_is_left_after_an_error_can_be_removed(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    unlink = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path.name == "model.safetensors":
            raise PermissionError(13, "Permission denied")
        unlink(path, missing_ok)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", refuse)
        assert main(["rm", "my-awq", "--yes"]) == 1
    assert "model.safetensors cannot be removed (Permission denied)" in capsys.readouterr().err
    assert not (artifact / "config.json").exists(), "no reader takes the rest for a model"
    assert main(["rm", "my-awq", "--yes"]) == 0
    assert not artifact.exists()


def test_without_a_terminal_it_needs_yes(artifact: Path, capsys: Capture) -> None:
    assert main(["rm", "my-awq"]) == 2
    assert "--yes" in capsys.readouterr().err
    assert artifact.is_dir()


@pytest.mark.parametrize(("answer", "stays"), [("y\n", False), ("n\n", True), ("\n", True), ("", True)])
def test_on_a_terminal_it_asks(
    answer: str, stays: bool, artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    import io

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    assert main(["rm", "my-awq", "--quiet"]) == (1 if stays else 0)
    assert artifact.exists() is stays
    error = capsys.readouterr().err
    assert "my-awq" in error
    assert "Remove this? [y/N]" in error
