"""What `--help` shows: options in groups, whole summaries, examples that can be copied."""

import re
import shlex
from typing import Annotated, Any

import pytest
import typer
from typer.main import get_command

from gemma_awq_cli.cli.app import app, main
from gemma_awq_cli.cli.help import CommandHelp

Capture = pytest.CaptureFixture[str]
EXAMPLES = """
tool first --count 3
tool second --size "1 GB" --share 0.5 --count 2 --plain one two three
"""


def _command(
    names: Annotated[list[str] | None, typer.Argument(help="Names.", metavar="NAME", show_default=False)] = None,
    count: Annotated[int, typer.Option(help="How many.", min=1, max=9, rich_help_panel="Amounts")] = 2,
    plain: Annotated[bool, typer.Option("--plain", help="Without a group.")] = False,
    share: Annotated[float | None, typer.Option(help="A share.  [default: all]", min=0.0, show_default=False)] = None,
    size: Annotated[str | None, typer.Option(help="A size.", rich_help_panel="Amounts")] = None,
) -> None:
    """Do something that takes a good many words to say, far more than a list of commands would leave room for.

    A paragraph.
    """


@pytest.fixture(scope="module")
def toy() -> Any:
    tool = typer.Typer(rich_markup_mode=None)
    tool.command("do", cls=CommandHelp, epilog=EXAMPLES)(_command)
    return get_command(tool)


def _help(command: Any, width: int) -> str:
    text: str = command.make_context("tool", [], resilient_parsing=True, terminal_width=width).get_help()
    return text


def test_options_lie_under_their_headings(toy: Any) -> None:
    text = _help(toy, 78)
    headings = re.findall(r"^(\S.*):$", text, re.MULTILINE)
    assert headings == ["Arguments", "Amounts", "Options", "Examples"]
    groups = dict(zip(headings, re.split(r"^\S.*:$", text, flags=re.MULTILINE)[1:], strict=True))
    assert "--count N" in groups["Amounts"]
    assert "--size TEXT" in groups["Amounts"]
    assert "--plain" in groups["Options"]
    assert "--help" in groups["Options"]
    columns = {line.index("  ", 3) + len(re.match(r"\s+", line[line.index("  ", 3) :])[0])  # type: ignore[index]
               for line in text.splitlines() if line.startswith("  --")}  # fmt: skip
    assert len(columns) == 1, "the help of all groups is aligned"


def test_values_and_bounds_read_as_english(toy: Any) -> None:
    text = _help(toy, 200)
    assert "Usage: tool [OPTIONS] [NAME]..." in text
    assert "How many.  [default: 2; 1 to 9]" in text
    assert "A share.  [default: all; at least 0]" in text
    assert "<" not in text


def test_examples_come_last_and_can_be_copied(toy: Any) -> None:
    wide = _help(toy, 98).partition("Examples:\n")[2]
    assert [line.strip() for line in wide.splitlines()] == EXAMPLES.strip().splitlines()
    narrow = _help(toy, 50).partition("Examples:\n")[2]
    assert narrow.count("\\\n") == 1
    assert max(map(len, narrow.splitlines())) <= 50
    assert shlex.split(narrow.replace("\\\n", "")) == shlex.split(EXAMPLES)


def test_summaries_are_whole(toy: Any, capsys: Capture) -> None:
    assert toy.get_short_help_str(20).endswith("would leave room for.")
    for command in ([], ["quantize"], ["run"], ["bench"], ["push"]):
        assert main([*command, "--help"]) == 0
        text = capsys.readouterr().out
        assert not re.search(r"\w\.\.\.", text)
        assert "[[" not in text
        assert "{" not in text.partition("\n")[0]


def test_every_example_is_a_command_line_that_is_accepted() -> None:
    program = get_command(app)
    context = program.make_context("gemma-awq", [], resilient_parsing=True)
    commands: dict[str, Any] = {name: program.get_command(context, name) for name in program.list_commands(context)}
    for command in (program, *commands.values()):
        for line in (command.epilog or "").strip().splitlines():
            words = shlex.split(re.sub(r"^.*\| |\s[<>#].*$", "", line))
            if words[:1] == ["gemma-awq"]:
                commands[words[1]].make_context(words[1], words[2:], parent=context)


@pytest.mark.parametrize("name", ["quantize", "run", "bench", "push"])
def test_a_command_with_examples_has_its_options_in_groups(name: str) -> None:
    context = get_command(app).make_context("gemma-awq", [], resilient_parsing=True)
    command: Any = context.command.get_command(context, name)  # type: ignore[attr-defined]
    assert command.epilog
    options = [option for option in command.params if option.param_type_name == "option"]
    assert [option.opts[0] for option in options if not option.rich_help_panel] == ["--offline", "--debug"]
    assert len(command.get_short_help_str()) <= 60


def test_help_fits_the_terminal(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    for columns in (60, 80, 120):
        monkeypatch.setenv("COLUMNS", str(columns))
        for command in ([], ["quantize"], ["run"], ["bench"], ["push"]):
            main([*command, "--help"])
            longest = max(map(len, capsys.readouterr().out.splitlines()))
            assert min(columns, 100) * 0.75 < longest <= min(columns, 100)


@pytest.mark.parametrize(
    ("arguments", "message", "command"),
    [
        (["quantise"], "No such command 'quantise'. Did you mean 'quantize'?", "gemma-awq"),
        (["quantize", "--group-size", "100"], "Invalid value for '--group-size': '100'", "gemma-awq quantize"),
        (["run", "--top-p", "2", "x"], "Invalid value for '--top-p': '2'", "gemma-awq run"),
        (["run", "--top-k", "x"], "Invalid value for '--top-k': 'x'", "gemma-awq run"),
        (["push"], "Missing argument 'REPO_ID'", "gemma-awq push"),
    ],
)
def test_a_wrong_command_line_names_the_value_and_the_help(
    arguments: list[str], message: str, command: str, capsys: Capture
) -> None:
    assert main(arguments) == 2
    usage, error, hint = capsys.readouterr().err.splitlines()
    assert usage.startswith(f"Usage: {command} ")
    assert error.startswith(f"error: {message}")
    assert hint == f"hint: See `{command} --help`."


def test_no_command_shows_the_help(capsys: Capture) -> None:
    assert main([]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert main(["--help"]) == 0
    assert shown.err == capsys.readouterr().out
