"""`serve --engine vllm` becomes vLLM's own server, with the right settings and no key among its arguments."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from gemma_awq_cli.cli.app import main


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    """The commands that took the place of the process, and their environments."""
    calls: list[tuple[list[str], dict[str, str]]] = []

    class Replaced(SystemExit):
        pass

    def execve(program: str, arguments: list[str], environment: dict[str, str]) -> None:
        assert program == arguments[0] == sys.executable
        calls.append((arguments, environment))
        raise Replaced(0)

    monkeypatch.setattr("os.execve", execve)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace() if name == "vllm" else None)
    return calls


def test_the_same_command_starts_vllm(
    started: list[tuple[list[str], dict[str, str]]],
    checkpoints: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GEMMA_AWQ_API_KEY", "secret-key")
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setattr("gemma_awq_cli.serve.vllm_server.available_memory", lambda: 3 * 10**9)
    monkeypatch.setattr("os.sysconf", {"SC_PHYS_PAGES": 10**6, "SC_PAGE_SIZE": 10**4}.__getitem__)
    folder = checkpoints("gemma3")
    options = ["--port", "81", "--tensor-parallel", "2", "--max-rows", "9", "--cors-origin", "https://a.example"]
    assert main(["serve", str(folder), "--engine", "vllm", *options]) == 0
    ((command, environment),) = started
    flags = dict(zip(command[-2::-1], command[:0:-1], strict=False))
    assert flags["--model"] == str(folder)
    assert flags["--served-model-name"] == "gemma3"
    assert flags["--dtype"] == "bfloat16"
    assert (flags["--host"], flags["--port"]) == ("127.0.0.1", "81")
    assert (flags["--tensor-parallel-size"], flags["--max-num-seqs"], flags["--max-model-len"]) == ("2", "9", "256")
    assert flags["--allowed-origins"] == '["https://a.example"]'
    assert flags["--limit-mm-per-prompt"] == '{"image": 0}'
    assert flags["--gpu-memory-utilization"] == "0.15"  # of the 10 GB, half of the 3 GB that are free
    assert "--no-use-tqdm-on-load" in command
    assert environment["VLLM_API_KEY"] == "secret-key"
    assert not any("secret" in argument for argument in command)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max-memory", "6GB"), "--max-memory cannot be used with --engine vllm"),
        (("--timeout", "5"), "--timeout cannot be used with --engine vllm"),
        (("--api-key-file", "{keys}"), "vLLM's server takes one API key"),
    ],
)
def test_what_vllm_lacks_is_refused(
    options: tuple[str, str],
    message: str,
    started: list[tuple[list[str], dict[str, str]]],
    checkpoints: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "keys").write_text("one\ntwo\n")
    given = [option.format(keys=tmp_path / "keys") for option in options]
    assert main(["serve", str(checkpoints("gemma3")), "--engine", "vllm", *given]) == 2
    assert message in capsys.readouterr().err
    assert not started
