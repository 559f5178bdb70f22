"""Which files of a folder are published, and what stops it."""

import json
import subprocess
from pathlib import Path

import pytest

from gemma_awq_cli import outgoing
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.outgoing import OutgoingFile, published_report, require_publishable, require_weights_named

ARTIFACT = ["config.json", "model.safetensors", "quantization_report.json", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "artifact"
    root.mkdir()
    for name in ARTIFACT:
        (root / name).write_text("{}")
    return root


def test_an_artifact_and_what_the_hubs_client_left_in_it(folder: Path) -> None:
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / "x.lock").touch()
    (folder / ".gitattributes").touch()
    (folder / "GEMMA_TERMS.html").touch()
    assert [path.name for path in require_publishable(folder)] == ["GEMMA_TERMS.html", *ARTIFACT]


@pytest.mark.parametrize(
    "name",
    [
        ".env",
        ".env.local",
        "token",
        "hf_token.txt",
        ".netrc",
        "id_rsa",
        "server.pem",
        "my_credentials.json",
        "api-key.txt",
    ],
)
def test_a_secret_stops_it(name: str, folder: Path) -> None:
    (folder / name).write_text("x")
    with pytest.raises(GemmaAwqError, match=f"looks like a secret: {name}"):
        require_publishable(folder)


@pytest.mark.parametrize("name", ["notes.txt", "optimizer.pt", "pytorch_model.bin", "runs/events", ".DS_Store"])
def test_what_is_no_part_of_an_artifact_stops_it(name: str, folder: Path) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("x")
    with pytest.raises(GemmaAwqError, match=f"no part of an artifact: {name}"):
        require_publishable(folder)


@pytest.mark.parametrize(
    "text", [f"hf_{'a' * 34}", f"ghp_{'B' * 36}", "-----BEGIN RSA PRIVATE KEY-----", "AKIA" + "Z" * 16]
)
def test_a_token_inside_a_file_stops_it(text: str, folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"use_auth_token": text}))
    with pytest.raises(GemmaAwqError, match=r"tokenizer_config.json holds what looks like") as caught:
        require_publishable(folder)
    assert text not in caught.value.message + caught.value.hint


def test_links_and_files_too_large(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").write_text("{}")
    (folder / "generation_config.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(GemmaAwqError, match=r"symbolic links: generation_config.json"):
        require_publishable(folder)
    (folder / "generation_config.json").unlink()
    monkeypatch.setattr(outgoing, "FILE_LIMIT", 1)
    with pytest.raises(GemmaAwqError, match="the hub takes"):
        require_publishable(folder)


def test_weights_that_no_index_names(folder: Path) -> None:
    (folder / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(GemmaAwqError, match=r"its index does not name: model-00001-of-00002.safetensors"):
        require_weights_named(folder, require_publishable(folder))


def test_hashes_are_gits_and_sha256sums(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 9000)
    run = subprocess.run(["git", "hash-object", str(path)], capture_output=True, text=True, check=True)
    sums = subprocess.run(["sha256sum", str(path)], capture_output=True, text=True, check=True)
    for file in (OutgoingFile("file", path), OutgoingFile("file", path.read_bytes())):
        assert file.blob_id == run.stdout.strip()
        assert file.sha256 == sums.stdout.split()[0]


def test_the_published_report_names_no_folder_of_this_machine() -> None:
    def report(model: str, revision: str | None, calibration: str) -> dict[str, object]:
        return {
            "source": {"model": model, "revision": revision},
            "arguments": {"calibration": calibration},
            "fingerprint": {"calibration": calibration},
        }

    private = json.dumps(published_report(report("/home/ann/secret/gemma-ft", None, "/home/ann/mails.jsonl")))
    assert "ann" not in private
    assert '"gemma-ft"' in private
    assert private.count('"mails.jsonl"') == 2
    public = json.dumps(published_report(report("google/gemma-3-1b-it", "abc", "Salesforce/wikitext")))
    assert '"google/gemma-3-1b-it"' in public
    assert '"Salesforce/wikitext"' in public
