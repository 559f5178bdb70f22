"""The command reference under docs/ is what `--help` prints."""

import re
from importlib.metadata import version
from pathlib import Path

import pytest

from gemma_awq_cli.cli.app import main
from tests.command_reference import REFERENCE, command_reference

CONSTRAINTS = Path(__file__).parent.parent.parent / "constraints.txt"


def test_the_command_reference_is_up_to_date() -> None:
    if f"typer=={version('typer')}\n" not in CONSTRAINTS.read_text(encoding="utf-8"):
        pytest.skip("the reference is written with the version of Typer in constraints.txt")
    assert REFERENCE.read_text(encoding="utf-8") == command_reference(), (
        "docs/commands.md differs from --help: run `python -m tests.command_reference` and commit the file"
    )


def test_it_does_not_depend_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = command_reference()
    for columns in ("20", "300"):
        monkeypatch.setenv("COLUMNS", columns)
        assert command_reference() == text
    assert max(map(len, re.findall(r"```text\n(.*?)```", text, re.DOTALL)[0].splitlines())) <= 100
    assert text.isascii()


def test_it_is_what_a_terminal_shows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = command_reference()
    for command in ([], ["quantize"], ["run"], ["serve"], ["bench"], ["inspect"], ["push"]):
        assert main([*command, "--help"]) == 0
        assert f"```text\n{capsys.readouterr().out}```" in text
