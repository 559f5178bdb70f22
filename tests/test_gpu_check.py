"""The check for a real GPU, as far as there is none: every stage runs on tiny sizes, and none takes others with it."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("warm_python")]  # each stage is a process
SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu_check.py"
SLICE = SCRIPT.with_name("gpu_slice.py")


def check(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return int(ended.value.code or 0)


def stages(document: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(document.read_text(encoding="utf-8"))["stages"]
    return found


def dry_run(device: str, numbers: str, document: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> dict[str, Any]:
    """The records of some stages, all of which have passed."""
    code = check(monkeypatch, document, "--dry-run", "--device", device, "--only", numbers, "--cap", "250", *more)
    found = stages(document)
    assert {name: record["outcome"] for name, record in found.items()} == dict.fromkeys(numbers.split(","), "passed")
    assert code == 0
    assert all(record["result"]["finished"] for record in found.values())
    return found


def test_some_stages_run_dry_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dry_run("cpu", "0,1,10", tmp_path / "check.json", monkeypatch)


@pytest.mark.thorough
def test_the_stage_of_determinism_runs_dry_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = dry_run("cpu", "4", tmp_path / "check.json", monkeypatch)
    assert found["4"]["result"]["same_bytes_after_resuming"] is True


@pytest.mark.thorough
def test_a_slice_of_a_model_is_compared_with_what_was_made_of_it(
    tmp_path: Path, checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here of a tiny model, whose tokens are bytes."""
    cut = ["--layers", "0,1", "--tokens", "200"]
    monkeypatch.setattr(sys, "argv", [str(SLICE), str(checkpoints("gemma3_text")), str(tmp_path / "slice"), *cut])
    runpy.run_path(str(SLICE), run_name="__main__")
    config = json.loads((tmp_path / "slice" / "model" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["vocab_size"]) == (2, 200)
    found = dry_run("cpu", "3,5,11,12", tmp_path / "check.json", monkeypatch, "--slice", str(tmp_path / "slice"))
    assert set(found["3"]["result"]["equal_integers_of_slice"].values()) == {1.0}
    assert 0 < found["5"]["result"]["difference_of_slices_logits"] < 1e-4


def test_a_stage_that_takes_too_long_is_ended_and_the_others_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = tmp_path / "check.json"
    assert check(monkeypatch, document, "--dry-run", "--only", "0") == 0
    assert check(monkeypatch, document, "--dry-run", "--only", "1,3", "--cap", "0.2") == 1
    assert {name: record["outcome"] for name, record in stages(document).items()} == {
        "0": "passed", "1": "timed out", "3": "timed out",
    }  # fmt: skip
    assert check(monkeypatch, document, "--dry-run", "--from", "10", "--deadline", "0") == 1  # left for another call
    assert "10" not in stages(document)
