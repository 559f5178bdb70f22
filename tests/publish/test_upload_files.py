"""Which files of a folder are published, and what stops it."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.publish import artifact_folder
from gemma_awq_cli.publish.artifact_folder import publishable_files, require_weights_in_index, system_leftovers
from gemma_awq_cli.publish.privacy import require_nothing_private, without_paths
from gemma_awq_cli.publish.public_documents import public_bench, public_report
from gemma_awq_cli.publish.upload_file import UploadFile
from tests.documents import full_bench, full_report, leaves, planted

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
    assert [path.name for path in publishable_files(folder)] == ["GEMMA_TERMS.html", *ARTIFACT]


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
        "tokenizer.env",
        "LICENSE.pem",
        "NOTICE.key",
        "GEMMA_TERMS_password.txt",
    ],
)
def test_a_secret_stops_it(name: str, folder: Path) -> None:
    (folder / name).write_text("x")
    with pytest.raises(GemmaAwqError, match=f"looks like a secret: {name}"):
        publishable_files(folder)


@pytest.mark.parametrize(
    "name",
    [
        "notes.txt", "optimizer.pt", "pytorch_model.bin", "runs/events", "tokenizer_backup.json", "LICENSE.extra",
        "chat_template.py", "model-x-of-y.safetensors",
        "model-00001-of-00002.safetensors.bak", "NOTICE/x", "MY_TERMS.doc",
        "tokenizer.json/x", "Config.json",
    ],
)  # fmt: skip
def test_what_is_no_part_of_an_artifact_stops_it(name: str, folder: Path) -> None:
    path = folder / name
    if path.parent.is_file():
        path.parent.unlink()
    path.parent.mkdir(exist_ok=True)
    path.write_text("x")
    with pytest.raises(GemmaAwqError, match=f"no part of an artifact: {name}"):
        publishable_files(folder)


LEFTOVERS = (
    ".DS_Store", "Thumbs.db", "desktop.ini", "._model.safetensors", ".Spotlight-V100/store", "__MACOSX/._config.json",
    "__MACOSX/.env", ".Trash-1000/x", "config.json:Zone.Identifier",
)  # fmt: skip


@pytest.mark.parametrize("name", LEFTOVERS)
def test_what_a_system_left_there_is_passed_over(name: str, folder: Path) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("x")
    assert [path.name for path in publishable_files(folder)] == ARTIFACT
    assert any(left in name for left in system_leftovers(folder))


def header(metadata: object) -> bytes:
    text = json.dumps({"__metadata__": metadata, "x": {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]}}).encode()
    return len(text).to_bytes(8, "little") + text


TOKEN = f"hf_{'a' * 34}"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", json.dumps({"use_auth_token": TOKEN})),
        ("tokenizer.json", json.dumps({"model": {"vocab": {TOKEN: 1}}})),
        ("config.json", json.dumps({"a": [{TOKEN: 1}]})),
        ("config.json", json.dumps({"a": TOKEN}).replace("hf_", "\\u0068\\u0066_")),
        ("chat_template.jinja", f"{{# {TOKEN} #}}"),
        ("chat_template.jinja", f"{{# {TOKEN} #}}".encode("utf-16")),
        ("LICENSE", f"Licence\n{TOKEN}\n"),
        ("LICENSE.md", f"Licence\n{TOKEN}\n".encode("utf-16-be")),
        ("NOTICE.txt", "-----BEGIN RSA PRIVATE KEY-----"),
        ("tokenizer.model", b"\n\x0e\x0a\x05" + TOKEN.encode() + b"\x15\0\0"),
        ("model.safetensors", header({"format": "pt", "token": TOKEN})),
        ("model.safetensors", header({"format": "pt", "password": "hunter2!"})),
        ("README.md", TOKEN),
    ],
)
def test_a_secret_inside_a_file_stops_it(name: str, content: str | bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(GemmaAwqError, match=f"{name} holds what looks like") as caught:
        require_nothing_private([UploadFile(name, path)])
    for secret in (TOKEN, "hunter2"):
        assert secret not in caught.value.message + caught.value.hint


@pytest.mark.parametrize(
    "place", ["/home/ann/models/x", "C:\\Users\\ann\\x", "\\\\server\\share\\x", "file:///home/ann", "~/x"]
)
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("config.json", lambda place: json.dumps({"a": {"b": [place]}})),
        ("special_tokens_map.json", lambda place: json.dumps({"comment": f"made from {place} today"})),
        ("tokenizer.json", lambda place: json.dumps({"x": place, "model": {"vocab": {"/home": 1}}})),
        ("model.safetensors", lambda place: header({"format": "pt", "from": place})),
        ("chat_template.jinja", lambda place: f"{{# from {place} #}}"),
    ],
)
def test_a_place_of_a_machine_stops_it(
    name: str, make: Callable[[str], str | bytes], place: str, tmp_path: Path
) -> None:
    content = make(place)
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(GemmaAwqError, match=f"{name} names a local path"):
        require_nothing_private([UploadFile(name, path)])


def test_json_is_sent_without_the_places_that_it_names(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"name_or_path": "/home/ann/gemma", "vocab_file": "/home/ann/v", "bos_token": "<bos>"}))
    file, fields = without_paths(path)
    require_nothing_private([file])
    assert isinstance(file.content, bytes)
    assert json.loads(file.content) == {"name_or_path": "gemma", "bos_token": "<bos>"}
    assert fields == ["name_or_path", "vocab_file"]
    path.write_text('{"bos_token":   "<bos>"}')
    assert without_paths(path)[0].content == path
    path.write_text("{")
    with pytest.raises(GemmaAwqError, match=r"tokenizer_config.json is not valid JSON"):
        without_paths(path)


def test_no_report_and_no_bench_names_a_place(tmp_path: Path) -> None:
    """In whatever field one was."""
    for make, published in ((full_report, public_report), (full_bench, public_bench)):
        for place, value in leaves(make()):
            if isinstance(value, str):
                document = published(planted(make(), place, "/home/ann/secret/thing"))
                assert "ann" not in json.dumps(document), place


def test_links_and_files_too_large(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").write_text("{}")
    (folder / "generation_config.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(GemmaAwqError, match=r"symbolic links: generation_config.json"):
        publishable_files(folder)
    (folder / "generation_config.json").unlink()
    monkeypatch.setattr(artifact_folder, "FILE_LIMIT", 1)
    with pytest.raises(GemmaAwqError, match="above the limit of"):
        publishable_files(folder)


def test_weights_that_no_index_names(folder: Path) -> None:
    (folder / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(GemmaAwqError, match=r"its index does not name: model-00001-of-00002.safetensors"):
        require_weights_in_index(folder, publishable_files(folder))


def test_hashes_are_gits_and_sha256sums(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 9000)
    run = subprocess.run(["git", "hash-object", str(path)], capture_output=True, text=True, check=True)
    sums = subprocess.run(["sha256sum", str(path)], capture_output=True, text=True, check=True)
    for file in (UploadFile("file", path), UploadFile("file", path.read_bytes())):
        assert file.blob_id == run.stdout.strip()
        assert file.sha256 == sums.stdout.split()[0]


def test_the_public_report_names_no_folder_of_this_machine() -> None:
    def report(model: str, revision: str | None, calibration: str) -> dict[str, object]:
        return {
            "source": {"model": model, "revision": revision},
            "arguments": {"calibration": calibration},
            "fingerprint": {"calibration": calibration},
        }

    private = json.dumps(public_report(report("/home/ann/secret/gemma-ft", None, "/home/ann/mails.jsonl")))
    assert "ann" not in private
    assert '"gemma-ft"' in private
    assert private.count('"mails.jsonl"') == 2
    public = json.dumps(public_report(report("google/gemma-3-1b-it", "abc", "Salesforce/wikitext")))
    assert '"google/gemma-3-1b-it"' in public
    assert '"Salesforce/wikitext"' in public
