"""The Python API: what it exports, what it returns and reports, and that the command line is made of it."""

import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields, replace
from pathlib import Path

import pytest

import gemma_awq_cli
from gemma_awq_cli import GemmaAwqError, QuantizeRequest, UsageError, plan_model, quantize_model
from gemma_awq_cli.cli import quantize as quantize_command
from gemma_awq_cli.cli.app import main
from gemma_awq_cli.events import Note
from gemma_awq_cli.quantize.events import Event, LayerDone, LayersStarted, PlanMade, SourceFound
from gemma_awq_cli.quantize.request import QuantizeOptions
from tests.conftest import quantize_arguments

DOCUMENT = Path(gemma_awq_cli.__file__).parent.parent / "docs" / "python-api.md"


def request_of(checkpoint: Path, output: Path, text: Path) -> QuantizeRequest:
    """The request that `quantize_arguments` makes on the command line."""
    return QuantizeRequest(
        str(checkpoint),
        output,
        calibration=str(text),
        group_size=32,
        num_samples=24,
        general_samples=0,
        seq_len=40,
        device="cpu",
    )


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, gemma_awq_cli\nassert 'quantize_model' in dir(gemma_awq_cli)\n"
        "heavy = {'torch', 'transformers', 'typer', 'rich'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("name", gemma_awq_cli.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    value = getattr(gemma_awq_cli, name)
    if name != "__version__":
        assert inspect.getdoc(value)
        assert f"`{name}" in DOCUMENT.read_text(encoding="utf-8")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'quantise_model'"):
        gemma_awq_cli.quantise_model  # noqa: B018


def test_the_package_is_typed() -> None:
    assert (Path(gemma_awq_cli.__file__).parent / "py.typed").is_file()


def test_quantize_model_writes_what_the_command_writes(
    tmp_path: Path, checkpoints: Callable[[str], Path], artifacts: Callable[[str], Path], text_file: Path
) -> None:
    events: list[Event] = []
    out = tmp_path / "out"
    result = quantize_model(
        checkpoints("gemma"), out, calibration=str(text_file), group_size=32, num_samples=24, general_samples=0,
        seq_len=40, device="cpu",
        on_event=events.append,
    )  # fmt: skip
    assert result.folder == out
    assert not result.found
    assert result.report == json.loads((out / "quantization_report.json").read_text())
    for path in artifacts("gemma").iterdir():
        if path.name != "quantization_report.json":
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    kinds = [type(event) for event in events if not isinstance(event, Note)]
    assert kinds == [SourceFound, PlanMade, LayersStarted, LayerDone, LayerDone, LayerDone]
    layers = [event for event in events if isinstance(event, LayerDone)]
    assert [layer.index for layer in layers] == [0, 1, 2]
    assert all(0 < layer.error < layer.rtn_error and not layer.resumed for layer in layers)
    again = quantize_model(replace(request_of(checkpoints("gemma"), out, text_file), resume=True))
    assert again.found
    assert again.report == result.report
    with pytest.raises(GemmaAwqError, match="exists and is not empty") as caught:
        quantize_model(request_of(checkpoints("gemma"), out, text_file))
    assert caught.value.hint


def test_plan_model_writes_nothing(
    tmp_path: Path, checkpoints: Callable[[str], Path], artifacts: Callable[[str], Path], text_file: Path
) -> None:
    out = tmp_path / "out"
    planned = plan_model(request_of(checkpoints("gemma"), out, text_file))
    assert planned.folder == out
    assert planned.plan.layers == 3
    assert list(tmp_path.iterdir()) == []
    report = json.loads((artifacts("gemma") / "quantization_report.json").read_text())
    assert planned.plan.artifact_bytes == report["artifact"]["bytes"]


def test_a_library_prints_nothing(
    tmp_path: Path, checkpoints: Callable[[str], Path], text_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint = checkpoints("gemma3")
    capfd.readouterr()
    quantize_model(request_of(checkpoint, tmp_path / "out", text_file))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("group_size", 100), ("dtype", "float32"), ("quality", "good"), ("device", "tpu"), ("num_samples", 0),
        ("seq_len", 7), ("max_memory", 0),
    ],
)  # fmt: skip
def test_a_request_checks_its_values(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"Invalid {name}: {value!r}") as caught:
        QuantizeRequest(**{name: value})  # type: ignore[arg-type]
    assert caught.value.hint


def test_a_request_and_options_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has all options already"):
        quantize_model(QuantizeRequest(), tmp_path / "out")
    with pytest.raises(UsageError, match="has all options already"):
        quantize_model(QuantizeRequest(), quality="best")


def test_request_options_and_command_line_agree() -> None:
    """On names and defaults, all three."""
    known = {field.name: field for field in fields(QuantizeRequest)}
    assert set(QuantizeOptions.__annotations__) == set(known) - {"model", "output"}
    typed = inspect.get_annotations(QuantizeRequest)
    for name, kind in QuantizeOptions.__annotations__.items():
        assert kind == typed[name], name
    parameters = inspect.signature(quantize_command.command).parameters
    assert set(parameters) == set(known) | {"dry_run", "as_json", "quiet"}
    for name, field in known.items():
        assert field.default is not MISSING
        default = parameters[name].default
        assert (
            type(field.default)(getattr(default, "value", default)) == field.default
            if default is not None
            else (field.default is None)
        ), name


def test_the_command_asks_for_what_it_was_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from gemma_awq_cli.quantize import pipeline

    asked: list[QuantizeRequest] = []

    def keep(request: QuantizeRequest, **_: object) -> None:
        asked.append(request)
        raise GemmaAwqError("enough")

    monkeypatch.setattr(pipeline, "quantize_model", keep)
    arguments = quantize_arguments(tmp_path / "model", tmp_path / "out", tmp_path / "text", "--max-memory", "6GB")
    assert main([*arguments, "--quality", "best", "--resume"]) == 1
    expected = request_of(tmp_path / "model", tmp_path / "out", tmp_path / "text")
    assert asked == [replace(expected, max_memory=6 * 10**9, quality="best", resume=True)]
    for size in ("0", "6 apples"):
        assert main([*arguments[:-1], size]) == 2
    assert len(asked) == 1
