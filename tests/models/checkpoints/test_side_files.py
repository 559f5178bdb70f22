"""What of a source's folder gets into an artifact: known names alone, through no link to elsewhere, without places."""

import json
import os
import sys
from pathlib import Path

import pytest

from gemma_awq_cli.cli.app import main
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.side_files import SIDE_FILES, copy_side_files, is_leftover, not_copied, side_files
from gemma_awq_cli.quantize.preparation import source_notes
from tests.conftest import quantize_arguments
from tests.tiny import make_checkpoint

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        (folder / name).write_text("{}")
    return folder


def test_files_are_copied_by_their_exact_names(source: Path, tmp_path: Path) -> None:
    strays = [
        "LICENSE.extra",
        "tokenizer.env",
        "LICENSE.pem",
        "MY_TERMS.pdf",
        "chat_template.py",
        "tokenizer_old.json",
        "x.txt",
    ]
    kept = ["LICENSE", "NOTICE.md", "GEMMA_TERMS.html", "USE_POLICY.md", "chat_template.jinja", "tokenizer.model"]
    for name in (*strays, *kept, "model.safetensors", "pytorch_model.bin", ".DS_Store", "README.md", ".gitattributes"):
        (source / name).write_text(name)
    (source / "original").mkdir()
    (tmp_path / "out").mkdir()
    copy_side_files(side_files(source), tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == sorted([*kept, "tokenizer.json", "generation_config.json"])
    assert not_copied(source) == sorted([*strays, "original"])
    (note,) = source_notes(source, None)
    assert "LICENSE.extra, LICENSE.pem" in note
    assert "and 3 more" in note
    for name in strays:
        (source / name).unlink()
    (source / "original").rmdir()
    assert source_notes(source, None) == []


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
@pytest.mark.parametrize(
    "name", ["LICENSE", "NOTICE.md", "tokenizer_config.json", "chat_template.jinja", "tokenizer.model"]
)
def test_a_link_leads_nowhere_else(name: str, source: Path, tmp_path: Path) -> None:
    secret = tmp_path / ".netrc"
    secret.write_text("machine huggingface.co login ann password hunter2")
    for target in (secret, Path("..") / ".netrc", tmp_path / "gone", Path("/dev/zero"), Path("/etc/passwd")):
        (source / name).symlink_to(target)
        with pytest.raises(GemmaAwqError, match=name):
            side_files(source)
        (source / name).unlink()
    (source / "step").symlink_to(secret)
    (source / name).symlink_to("step")
    with pytest.raises(GemmaAwqError, match="leads out of its folder"):
        side_files(source)
    (source / name).unlink()
    (source / "sub").symlink_to(tmp_path)
    (source / name).symlink_to("sub/.netrc")
    with pytest.raises(GemmaAwqError, match="leads out of its folder"):
        side_files(source)
    (source / name).unlink()
    # within the folder, and to a hub cache's blobs
    (source / "text").write_text("{}")
    (source / name).symlink_to("text")
    assert name in side_files(source)
    (source / name).unlink()
    blobs = tmp_path / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "abc").write_text("{}")
    (source / name).symlink_to(blobs / "abc")
    assert name in side_files(source)


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes there")
def test_a_pipe_is_not_waited_for(source: Path) -> None:
    os.mkfifo(source / "LICENSE")
    with pytest.raises(GemmaAwqError, match="is not a regular file"):
        side_files(source)


def test_json_is_copied_without_the_places_of_this_machine(source: Path, tmp_path: Path) -> None:
    whole = {
        "name_or_path": "/home/ann/private/gemma", "vocab_file": "/home/ann/private/tokenizer.model",
        "tokenizer_file": "C:\\Users\\ann\\tokenizer.json", "bos_token": "<bos>", "sp_model_kwargs": {"x": "~/x/y"},
        "chat_template": "{{ '</s>/home' }}", "added_tokens_decoder": {"3": {"content": "/home/x"}},
        "auto_map": {"AutoProcessor": "org/name--module.Class"}, "processor": {"_name_or_path": "out/private/gemma"},
    }  # fmt: skip
    (source / "tokenizer_config.json").write_text(json.dumps(whole))
    (source / "special_tokens_map.json").write_text('{"bos_token":"<bos>"}')
    out = tmp_path / "out"
    out.mkdir()
    copy_side_files(side_files(source), out)
    assert json.loads((out / "tokenizer_config.json").read_text()) == {
        "name_or_path": "gemma", "bos_token": "<bos>", "sp_model_kwargs": {"x": "y"},
        "chat_template": whole["chat_template"],
        "added_tokens_decoder": {"3": {"content": "/home/x"}}, "auto_map": whole["auto_map"],
        "processor": {"_name_or_path": "gemma"},
    }  # fmt: skip
    assert (out / "special_tokens_map.json").read_bytes() == (source / "special_tokens_map.json").read_bytes()


def test_quantize_copies_no_secret_and_publishes_no_place(text_file: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = make_checkpoint(tmp_path / "source", "gemma3")
    secret = tmp_path / "secret"
    secret.write_text("hunter2")
    config = json.loads((folder / "config.json").read_text())
    config["_name_or_path"] = str(tmp_path / "private-run")
    config["text_config"]["_name_or_path"] = "/home/ann/base"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "LICENSE.extra").symlink_to(secret)
    assert main(quantize_arguments(folder, tmp_path / "out", text_file)) == 0
    assert (
        "Not copied into the artifact, because they are not known to belong to a model: LICENSE.extra"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "out" / "LICENSE.extra").exists()
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (stored["_name_or_path"], stored["text_config"]["_name_or_path"]) == ("private-run", "base")
    (folder / "LICENSE").symlink_to(secret)
    assert main(quantize_arguments(folder, tmp_path / "other", text_file)) == 1
    assert "LICENSE leads out of its folder" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_names() -> None:
    assert not any(is_leftover(name) for name in SIDE_FILES)
    assert all("/" not in name and "*" not in name for name in SIDE_FILES)
