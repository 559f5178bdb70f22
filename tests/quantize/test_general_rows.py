"""Rows of the embedded text beside those of another: how many there are, where they stand, what records them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma_awq_cli.calibration_text.recipes import DEFAULT_RECIPE, find_recipe
from gemma_awq_cli.calibration_text.rows import Rows, build_rows, with_rows_of
from gemma_awq_cli.cli.app import main
from gemma_awq_cli.models.text.prompter import Prompter
from gemma_awq_cli.publish.model_card import quantize_command
from gemma_awq_cli.quantize.request import QuantizeRequest
from tests.conftest import quantize_arguments, tiny_rows

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize(("options", "rows", "added"), [
    ({"calibration": "mine.txt"}, 128, 32),
    ({"calibration": "mine.txt"}, 16, 8),
    ({"calibration": "mine.txt", "quality": "fast"}, 128, 32),
    ({"calibration": "mine.txt", "quality": "best"}, 128, 0),
    ({"calibration": "mine.txt", "quality": "best", "general_samples": 5}, 128, 5),
    ({"calibration": "mine.txt", "general_samples": 0}, 128, 0),
    ({"calibration": "embedded", "general_samples": 0}, 128, 0),
    ({"calibration": "self"}, 128, 0),
])  # fmt: skip
def test_how_many_are_added(options: dict[str, Any], rows: int, added: int) -> None:
    assert QuantizeRequest(**options).general_rows(rows) == added


@pytest.mark.parametrize("calibration", ["embedded", "self"])
def test_none_are_added_where_there_is_no_other_text(calibration: str, capsys: Capture) -> None:
    assert main(["quantize", "--calibration", calibration, "--general-samples", "9", "--dry-run"]) == 2
    assert f"not to {calibration}" in capsys.readouterr().err


def with_general(checkpoint: Path, rows: Rows, count: int) -> Rows:
    return with_rows_of(rows, find_recipe(DEFAULT_RECIPE), Prompter(checkpoint), count, seed=0)


def test_they_come_behind_the_texts_own(checkpoints: Callable[[str], Path], text_file: Path) -> None:
    folder = checkpoints("gemma")
    rows = tiny_rows(folder, text_file)
    both = with_general(folder, rows, 8)
    alone = build_rows(find_recipe(DEFAULT_RECIPE), Prompter(folder), 8, rows.ids.shape[1], seed=0, heldout_samples=1)
    assert torch.equal(both.ids, torch.cat([rows.ids, alone.ids]))
    assert both.added == 8
    assert both.text_sha256 != rows.text_sha256
    assert torch.equal(both.heldout, rows.heldout)


def test_rows_that_are_too_long_for_the_embedded_text(checkpoints: Callable[[str], Path], text_file: Path) -> None:
    rows = tiny_rows(checkpoints("gemma"), text_file)
    long = Rows(torch.zeros(2, 10**7, dtype=torch.int64), rows.heldout, "", "", "long")
    both = with_general(checkpoints("gemma"), long, 8)
    assert both.added == 0
    assert both.ids.shape == long.ids.shape


def test_an_artifact_records_them(
    tmp_path: Path, checkpoints: Callable[[str], Path], text_file: Path, capsys: Capture
) -> None:
    arguments = [*quantize_arguments(checkpoints("gemma"), tmp_path / "out", text_file), "--quality", "fast"]
    place = arguments.index("--general-samples")
    del arguments[place : place + 2]
    assert main(arguments) == 0
    assert "8 rows of the embedded text are added" in capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    assert report["calibration"]["rows"] == 32
    assert report["calibration"]["text"].endswith(" + 8 rows of embedded")
    assert report["arguments"]["general_samples"] == 8
    assert "--general-samples 8" in quantize_command(report)
    assert main(["verify", str(tmp_path / "out"), "--layers", "1"]) == 0
    # a report without the number, such as an older one, is of an artifact without such rows
    del report["arguments"]["general_samples"]
    (tmp_path / "out" / "quantization_report.json").write_text(json.dumps(report))
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "out"), "--layers", "1"]) == 4
    assert "The calibration rows are not those that were used" in capsys.readouterr().err
    assert main([*arguments, "--general-samples", "3", "--resume"]) == 1


def test_an_artifact_without_them_says_so(artifacts: Callable[[str], Path]) -> None:
    """Its command, made again, adds none."""
    report = json.loads((artifacts("gemma") / "quantization_report.json").read_text())
    assert report["arguments"]["general_samples"] == 0
    assert "--general-samples 0" in quantize_command(report)


@pytest.mark.parametrize("calibration", ["embedded", "self"])
def test_other_text_alone_has_them_recorded(calibration: str) -> None:
    assert "general_samples" not in QuantizeRequest(calibration=calibration).reported("cpu", 128, 0)
