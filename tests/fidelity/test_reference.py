"""The 16-bit original of an artifact: where its report says it is, or what the user names instead."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.fidelity.reference import find_original
from gemma_awq_cli.reports.stored_documents import read_quantization_report
from tests.tiny import edit_weights, make_checkpoint

HINT = "Name it."


@pytest.fixture
def report(artifacts: Callable[[str], Path]) -> dict[str, Any]:
    return read_quantization_report(artifacts("gemma"))


def found(report: dict[str, Any], given: str | None = None) -> tuple[Path, bool]:
    original = find_original(report, given, HINT, lambda _: None)
    return original.checkpoint.folder, original.is_source


def test_it_is_where_the_report_says(report: dict[str, Any], checkpoints: Callable[[str], Path]) -> None:
    assert found(report) == (checkpoints("gemma"), True)


def test_a_source_that_changed_since_is_an_error(
    report: dict[str, Any], checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    changed = Path(shutil.copytree(checkpoints("gemma"), tmp_path / "changed"))
    edit_weights(changed, lambda tensors: tensors["model.norm.weight"].add_(0.5))
    report["source"]["model"] = str(changed)
    with pytest.raises(GemmaAwqError, match="has changed since this artifact was quantized from it") as caught:
        found(report)
    assert caught.value.hint == HINT


def test_another_checkpoint_that_is_named_is_told_from_the_source(
    report: dict[str, Any], checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    other = make_checkpoint(tmp_path / "other", "gemma", seed=5)
    assert found(report, str(other)) == (other, False)
    report["source"]["model"] = "/no/such/checkpoint"
    assert found(report, str(checkpoints("gemma"))) == (checkpoints("gemma"), True)


@pytest.mark.parametrize("revision", [None, "0" * 40])
@pytest.mark.parametrize("name", ["/no/such/checkpoint", "nobody/nothing", "../../etc", "a b c", "-x/-y"])
def test_a_source_that_is_not_here_is_an_error(
    report: dict[str, Any], name: str, revision: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    report = json.loads(json.dumps(report))
    report["source"] |= {"model": name, "revision": revision}
    with pytest.raises(GemmaAwqError, match="is not on this machine") as caught:
        found(report)
    assert caught.value.hint == HINT
