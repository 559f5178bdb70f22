"""The source's own card: what it declares of its licence is read with bounds, before anything is computed."""

import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma_awq_cli.cli.app import main
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.source_metadata import METADATA_CHARACTERS, source_card
from gemma_awq_cli.models.gemma.terms import GEMMA_TERMS
from gemma_awq_cli.publish.licensing import decide_licence
from gemma_awq_cli.quantize import preparation
from tests.conftest import quantize_arguments
from tests.layers import as_layer_begins
from tests.tiny import make_checkpoint

Capture = pytest.CaptureFixture[str]
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
)


def declared(folder: Path, text: str | bytes) -> dict[str, Any] | None:
    (folder / "README.md").write_bytes(text if isinstance(text, bytes) else text.encode())
    return source_card(folder)


def test_what_a_card_declares(tmp_path: Path) -> None:
    assert source_card(tmp_path) is None
    for text in (
        "",
        "# no metadata\n",
        "---\nnever closed\n",
        "text\n---\nlicense: gemma\n---\n",
        "----\nlicense: x\n---\n",
    ):
        assert declared(tmp_path, text) is None
    whole = {"license": "gemma", "base_model": "google/gemma-3-1b-pt"}
    text = "---\nlicense: gemma\nbase_model: google/gemma-3-1b-pt\ntags: [x]\n---\n# A\n"
    for form in (text, "\ufeff" + text, "\n\n" + text, text.replace("\n", "\r\n"), text.removesuffix("\n# A\n")):
        assert declared(tmp_path, form) == whole
    assert declared(tmp_path, "---\nbase_model:\n- a/b\n- c/d\nlicense: [gemma]\n---\n") == {
        "license": ["gemma"], "base_model": ["a/b", "c/d"],
    }  # fmt: skip
    assert declared(tmp_path, "---\nlicense: ~\nbase_model:\nlicense_name: null\n---\n") == {}
    assert declared(tmp_path, "---\ntags: [x]\n---\n") == {}


@pytest.mark.parametrize(
    "other",
    ["date: 2024-01-01", "blob: !!binary aGVsbG8=", "s: !!set {a, b}", "x: !!python/object/apply:os.system [ls]",
     "n: 1e999", "o: !!omap [a: 1]", "t: 2001-12-14t21:59:43.10-05:00", "i: 0x" + "f" * 5000,
     "b: yes", "n: .nan"],
)  # fmt: skip
def test_other_values_of_any_kind_do_not_matter(other: str, tmp_path: Path) -> None:
    assert declared(tmp_path, f"---\n{other}\nlicense: gemma\n---\n") == {"license": "gemma"}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("license: [", "is not valid YAML"), ("just text", "is no list of names and values"), ("- a", "is no list of"),
        (BOMB + "license: *j", "it uses an alias"), ("a: &a [*a]", "it uses an alias"),
        ("license: {a: b}", "license in the metadata of README.md is neither"),
        ("license: [[a]]", "license in the metadata"), (f"license: {'x' * 600}", "license in the metadata"),
        ('license: "a\\nb"', "license in the metadata"), ('license: "\\e[31m"', "license in the metadata"),
        (f"base_model: [{','.join('x' * 30)}]", "base_model in the metadata"),
        ("a: " + "[" * 10_000, "nested too deeply"), ("x: y\n" * 20_000, "has more than"),
        ("a: b: c", "not valid YAML"),
        ("? [a]\n: b", "is not valid YAML"), ("a: \0", "is not valid YAML"), ("license: gemma\n...\nlicense: mit", ""),
    ],
)  # fmt: skip
def test_a_card_that_cannot_be_read_says_why(text: str, why: str, tmp_path: Path) -> None:
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    card = declared(tmp_path, f"---\n{text}\n---\n")
    assert card is not None
    assert why in card["unreadable"]
    assert card.keys() == {"unreadable"}
    assert time.monotonic() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
    with pytest.raises(GemmaAwqError, match="licence is unknown") as caught:
        decide_licence(GEMMA_TERMS, card, {}, "changed", None, None)
    assert "--license gemma" in caught.value.hint
    assert decide_licence(GEMMA_TERMS, card, {}, "changed", "gemma", None).metadata == {"license": "gemma"}


def test_files_that_are_no_text(tmp_path: Path) -> None:
    assert "is UTF-16" in str(declared(tmp_path, "---\nlicense: gemma\n---\n".encode("utf-16")))
    assert "is not UTF-8" in str(declared(tmp_path, b"---\nlicense: \xff\n---\n"))
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").mkdir()
    assert source_card(tmp_path) is None
    outside = tmp_path / "outside"
    outside.write_text("---\nlicense: gemma\n---\n")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "README.md").symlink_to(outside)
    assert "leads out of its folder" in str(source_card(folder))
    assert METADATA_CHARACTERS < 100_000
    os.truncate(outside, 0)


def test_quantize_reads_it_before_the_first_layer_and_tells_what_it_cannot_read(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    source = make_checkpoint(tmp_path / "source", "gemma")
    (source / "README.md").write_text(f"---\n{BOMB}license: *j\n---\n")
    assert main(quantize_arguments(source, tmp_path / "out", text_file)) == 0
    assert "The source's licence is not known: The metadata of README.md" in capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    assert "alias" in report["source"]["card"]["unreadable"]
    push = ["push", "me/x", str(tmp_path / "out"), "--dry-run", "--base-model", "org/tiny"]
    assert main(push) == 1
    assert "licence is unknown" in capsys.readouterr().err
    assert main([*push, "--license", "gemma"]) == 0

    def read(folder: Path) -> Any:
        raise GemmaAwqError("read")

    def layer() -> None:
        raise AssertionError("a layer was begun")

    monkeypatch.setattr(preparation, "source_card", read)
    with as_layer_begins(0, layer):
        assert main(quantize_arguments(source, tmp_path / "other", text_file)) == 1


def test_a_dry_run_of_push_uses_what_was_declared(
    artifacts: Callable[[str], Path], tmp_path: Path, capsys: Capture
) -> None:
    import shutil

    folder = Path(shutil.copytree(artifacts("gemma"), tmp_path / "a"))
    report = json.loads((folder / "quantization_report.json").read_text())
    report["source"]["card"] = {"license": ["gemma"], "base_model": ["a/b"]}
    (folder / "quantization_report.json").write_text(json.dumps(report))
    assert main(["push", "me/x", str(folder), "--dry-run", "--base-model", "org/tiny"]) == 0
