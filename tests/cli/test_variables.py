"""Environment variables set options, the command line beats them, and errors name them."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from gemma_awq_cli.cli.app import app, main
from gemma_awq_cli.cli.variables import COMMAND_LINE_ONLY, PREFIX, SHARED
from tests import samples
from tests.cli.test_documentation import PAGES
from tests.conftest import make_cache
from tests.hub_server import TOKEN, Repo, hub_server

Capture = pytest.CaptureFixture[str]
PROGRAM: Any = typer.main.get_command(app)
OTHER = {"GEMMA_AWQ_CACHE", "GEMMA_AWQ_MODEL", "GEMMA_AWQ_API_KEY", "GEMMA_AWQ_WHEEL"}  # which set no option
NEEDED = {
    "export": ["model", "--to", "mlx"],
    "inspect": ["model"],
    "rm": ["name"],
    "push": ["owner/name"],
}  # what a command cannot lack


def _options() -> Iterator[tuple[str, Any]]:
    for name, command in PROGRAM.commands.items():
        for parameter in command.params:
            if getattr(parameter, "envvar", None):
                yield name, parameter


OPTIONS = {parameter.envvar + f" of {command}": (command, parameter) for command, parameter in _options()}


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(PREFIX) and name != "GEMMA_AWQ_CACHE":
            monkeypatch.delenv(name)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):  # which --offline sets
        monkeypatch.setenv(name, "1")


def _parsed(command: str, arguments: list[str], parameter: Any) -> Any:
    """The value of a parameter after parsing a command line."""
    group = PROGRAM.make_context("gemma-awq", [], resilient_parsing=True)
    typed = [*NEEDED.get(command, []), *arguments]
    context = PROGRAM.commands[command].make_context(command, typed, parent=group)
    return context.params[parameter.name]


def _samples(command: str, parameter: Any) -> list[tuple[str, list[str], Any]]:
    """Two values of an option, each as its variable holds it, as the command line has it, and as it is parsed."""
    option = next(name for name in parameter.opts if name.startswith("--"))
    if parameter.is_flag:
        sides = [("1", [option])] + [("0", [no]) for no in parameter.secondary_opts]
        return [(text, typed, _parsed(command, typed, parameter)) for text, typed in sides]
    context = PROGRAM.make_context("gemma-awq", [], resilient_parsing=True)
    shown = re.search(r"<(.*)>$", parameter.get_help_record(context)[0])
    choices = shown[1].split("|") if shown and "|" in shown[1] else []
    found = []
    for text in [*choices, "cpu", "cuda", "3", "5", "24", "48", "0.25", "0.5"]:
        try:
            typed = [f"{option}={text}"]
            value = _parsed(command, typed, parameter)
        except Exception:  # noqa: BLE001 - Typer's, whose class depends on its version
            continue
        if value not in [value for *_, value in found]:
            found.append((text, typed, value))
    return found[-2:]


@pytest.mark.parametrize("name", OPTIONS)
def test_a_variable_sets_its_option_and_the_command_line_beats_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    command, parameter = OPTIONS[name]
    samples = _samples(command, parameter)
    assert samples
    default = _parsed(command, [], parameter)
    assert any(value != default for *_, value in samples)
    for text, _, value in samples:
        monkeypatch.setenv(parameter.envvar, text)
        assert _parsed(command, [], parameter) == value
        for _, typed, other in samples:
            assert _parsed(command, typed, parameter) == other


def test_options_that_may_be_given_often_hold_several_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMMA_AWQ_BENCH_TASKS", "arc_easy,boolq  piqa")
    _, parameter = OPTIONS["GEMMA_AWQ_BENCH_TASKS of bench"]
    assert list(_parsed("bench", [], parameter)) == ["arc_easy,boolq", "piqa"]


@pytest.mark.parametrize(
    ("command", "variable", "value"),
    [
        ("quantize", "GEMMA_AWQ_QUANTIZE_SEED", "x"), ("quantize", "GEMMA_AWQ_QUANTIZE_QUALITY", "good"),
        ("quantize", "GEMMA_AWQ_QUANTIZE_STRICT", "perhaps"), ("run", "GEMMA_AWQ_THREADS", "0"),
        ("run", "GEMMA_AWQ_RUN_TEMPERATURE", "inf"), ("serve", "GEMMA_AWQ_SERVE_PORT", "99999"),
        ("bench", "GEMMA_AWQ_BENCH_MAX_KL", "nan"), ("bench", "GEMMA_AWQ_OFFLINE", "maybe"),
    ],
)  # fmt: skip
def test_a_bad_value_is_an_error_that_names_the_variable(
    command: str, variable: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv(variable, value)
    assert main([command]) == 2
    error = capsys.readouterr().err
    assert f"error: Invalid value for {variable}: " in error
    assert value in error
    option = next(parameter.opts[0] for _, parameter in _options() if parameter.envvar == variable)
    assert option not in error.replace(f"`gemma-awq {command} --help`", "")


def test_a_bad_value_that_was_typed_names_the_option(capsys: Capture) -> None:
    assert main(["quantize", "--quality", "good"]) == 2
    error = capsys.readouterr().err
    assert "error: Invalid value for '--quality': 'good'" in error
    assert PREFIX not in error


@pytest.mark.parametrize("name", sorted({name.partition(" ")[0] for name in OPTIONS}))
def test_an_empty_variable_is_an_error(name: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """What an unset variable of a script leaves would mean the default: no limit, or another device."""
    command, parameter = next(found for key, found in OPTIONS.items() if key.startswith(f"{name} "))
    monkeypatch.setenv(name, "")
    assert main([command, *NEEDED.get(command, [])]) == 2
    assert f"error: {name} is set but empty." in capsys.readouterr().err
    text, typed, value = _samples(command, parameter)[0]
    assert text
    assert _parsed(command, typed, parameter) == value


def test_an_error_of_the_command_says_which_variable_set_the_option(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("GEMMA_AWQ_DEVICE", "toaster")
    monkeypatch.setenv("GEMMA_AWQ_QUANTIZE_MAX_MEMORY", "much")
    assert main(["run", "Hello", "-m", "nowhere"]) == 2
    error = capsys.readouterr().err
    assert "Invalid device: 'toaster'" in error
    assert "(--device is set by GEMMA_AWQ_DEVICE.)" in error
    assert main(["quantize", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "Invalid size for --max-memory: 'much'" in error
    assert "(--max-memory is set by GEMMA_AWQ_QUANTIZE_MAX_MEMORY.)" in error
    assert main(["quantize", "--max-memory", "little"]) == 2
    assert PREFIX not in capsys.readouterr().err


def test_one_variable_sets_only_options_that_mean_the_same() -> None:
    for option in SHARED:
        found = [p for c in PROGRAM.commands.values() for p in c.params if option in p.opts]
        assert len({str(parameter.default) for parameter in found}) == 1, option
        assert len(found) > 1, option
    variables = [parameter.envvar for _, parameter in _options()]
    assert {name for name in variables if variables.count(name) > 1} == {
        PREFIX + option[2:].replace("-", "_").upper() for option in SHARED
    }


def test_options_without_a_variable_exist() -> None:
    options = {option for c in PROGRAM.commands.values() for p in c.params for option in p.opts} | {"--help"}
    assert options >= COMMAND_LINE_ONLY


def test_documents_name_variables_that_exist() -> None:
    known = OTHER | {parameter.envvar for _, parameter in _options()}
    reference = "".join(page.read_text(encoding="utf-8") for page in PAGES if page.name == "commands.md")
    assert set(re.findall(r"env\s+var:\s+(GEMMA_AWQ_\w+)", reference)) == known - OTHER
    for page in PAGES:
        assert set(re.findall(r"GEMMA_AWQ_\w*[A-Z]", page.read_text(encoding="utf-8"))) <= known, page


# --- offline, debug, version


@pytest.fixture
def home(tmp_path: Path, native_folder: Path) -> Path:
    """Where a process has its caches, with nothing in them but the compiled kernels."""
    make_cache(tmp_path / "cache", native_folder)
    return tmp_path


def _in_a_process(arguments: list[str], home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", PREFIX))}
    environment = {
        **inherited, "HF_HOME": str(home / "hub"), "GEMMA_AWQ_CACHE": str(home / "cache"), "HF_TOKEN": TOKEN,
        "PYTHONPATH": str(Path(__file__).parent.parent.parent), **variables,
    }  # fmt: skip
    command = [sys.executable, "-m", "gemma_awq_cli", *arguments]
    return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
@pytest.mark.usefixtures("warm_python")
@pytest.mark.parametrize(
    "typed",
    samples.of(
        [
            "run Hello -m org/model", "quantize org/model", "quantize org/model --dry-run",
            "quantize MODEL --seq-len 64 --calibration org/texts", "inspect org/model", "bench org/model",
            "serve org/model", "export org/model --to mlx",
            "push me/model ARTIFACT --yes --base-model google/gemma-3-1b-pt --license gemma",
        ],
        ["run Hello -m org/model", "quantize org/model --dry-run", "inspect org/model", "serve org/model"],
    ),
)  # fmt: skip
def test_offline_asks_no_hub(
    typed: str, checkpoints: Callable[[str], Path], artifacts: Callable[[str], Path], home: Path
) -> None:
    places = {"MODEL": str(checkpoints("gemma3")), "ARTIFACT": str(artifacts("gemma3"))}
    arguments = [places.get(argument, argument) for argument in typed.split()]
    with hub_server({"org/model": Repo({"main": checkpoints("gemma3")})}) as hub:
        done = _in_a_process([*arguments, "--offline"], home, HF_ENDPOINT=hub.url, HF_DATASETS_OFFLINE="0")
        assert hub.requests == []
        assert done.returncode == 1
        if "org/texts" not in arguments:  # whose error is the library's own
            assert "HF_HUB_OFFLINE is set or --offline given" in done.stderr
        by_variable = _in_a_process(arguments, home, HF_ENDPOINT=hub.url, GEMMA_AWQ_OFFLINE="1")
        assert hub.requests == []
        assert by_variable.stderr.startswith(done.stderr.rstrip())


@pytest.mark.slow
@pytest.mark.usefixtures("warm_python")
def test_offline_takes_a_model_from_the_cache(checkpoints: Callable[[str], Path], home: Path) -> None:
    ask = ["run", "Hello", "-m", "org/model", "--max-new-tokens", "2", "--device", "cpu", "--temperature", "0"]
    with hub_server({"org/model": Repo({"main": checkpoints("gemma3")})}) as hub:
        online = _in_a_process(ask, home, HF_ENDPOINT=hub.url)
        assert online.returncode == 0, online.stderr
        assert hub.requests
        hub.requests.clear()
        for typed in ([*ask, "--offline"], ["--offline", *ask]):
            offline = _in_a_process(typed, home, HF_ENDPOINT=hub.url)
            assert (offline.returncode, offline.stdout) == (0, online.stdout), offline.stderr
        assert hub.requests == []


@pytest.mark.parametrize("arguments", [["--debug", "inspect", "nowhere"], ["inspect", "nowhere", "--debug"]])
def test_debug_shows_where_an_error_is_from(arguments: list[str], capsys: Capture) -> None:
    assert main(["inspect", "nowhere"]) == 1
    plain = capsys.readouterr().err
    assert "Traceback" not in plain
    assert main(arguments) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("Traceback (most recent call last):\n")
    assert 'gemma_awq_cli/cli/inspect.py"' in shown.err.replace("\\", "/")
    assert shown.err.endswith(plain)
    assert main(["inspect", "nowhere"]) == 1
    assert "Traceback" not in capsys.readouterr().err, "--debug is for one command"


def test_debug_shows_the_cause_that_the_message_left_out(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "config.json").write_text('{"model_type": ')
    assert main(["run", "Hello", "-m", str(tmp_path), "--debug"]) == 1
    assert "JSONDecodeError" in capsys.readouterr().err


def test_version_as_json(capsys: Capture) -> None:
    from gemma_awq_cli import __version__

    for arguments in (["--version", "--json"], ["--json", "--version"]):
        assert main(arguments) == 0
        document = json.loads(capsys.readouterr().out)
        assert document["version"] == __version__
        assert document["python"] == ".".join(map(str, sys.version_info[:3]))
        assert document["libraries"]["torch"]
    assert main(["--json", "inspect", "nowhere"]) == 2
    assert "Put it behind the command." in capsys.readouterr().err
