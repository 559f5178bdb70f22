"""`gemma-awq run` from the command line: files of prompts, sampling that is said, options that exclude each other."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gemma_awq_cli.cli.app import main
from tests.tiny import edit_weights, make_checkpoint

Capture = pytest.CaptureFixture[str]


def test_a_file_of_prompts_and_a_resumed_run(tmp_path: Path, artifacts: Callable[[str], Path], capsys: Capture) -> None:
    source, target = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    source.write_text("Hello\n\nThe quick brown fox\na\n", encoding="utf-8")
    arguments = [
        "run", "-m", str(artifacts("gemma")), "--input", str(source), "--output", str(target), "--device", "cpu",
        "--max-new-tokens", "4", "--batch-size", "2", "--temperature", "1.5",
    ]  # fmt: skip
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == str(target)
    assert "\x1b" not in captured.err
    whole = target.read_bytes()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [row["prompt"] for row in rows] == ["Hello", "The quick brown fox", "a"]
    assert f"seed {rows[0]['made_with']['seed']}." in captured.err  # nobody gave one: it was drawn and said

    assert main(arguments) == 1
    assert "--resume" in capsys.readouterr().err
    lines = whole.splitlines(keepends=True)
    target.write_bytes(lines[0] + lines[1][:30])
    assert main([*arguments, "--resume"]) == 0  # the drawn seed is taken up again
    assert "1 of 3 prompts" in capsys.readouterr().err
    assert target.read_bytes() == whole
    assert main([*arguments, "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["completed_now"] == 0
    assert main([*arguments, "--resume", "--max-new-tokens", "5"]) == 1
    assert "max_new_tokens 4, now 5" in capsys.readouterr().err
    assert target.read_bytes() == whole


def test_log_probabilities_and_penalties(tmp_path: Path, artifacts: Callable[[str], Path], capsys: Capture) -> None:
    model = ["-m", str(artifacts("gemma")), "--device", "cpu", "--max-new-tokens", "4", "--threads", "1"]
    more = [
        "--logprobs",
        "2",
        "--seed",
        "1",
        "--min-p",
        "0.1",
        "--repetition-penalty",
        "1.2",
        "--presence-penalty",
        "1",
    ]
    assert main(["run", "Hi", *model, *more, "--frequency-penalty", "-0.5", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["sampling"] == (
        "temperature 1, min-p 0.1, repetition penalty 1.2, presence penalty 1, frequency penalty -0.5, seed 1"
    )
    assert len(document["logprobs"]) == document["tokens"] == 4
    for token in document["logprobs"]:
        assert token["top"][0]["logprob"] >= token["logprob"]
        assert len(token["top"]) == 2
        assert {"token", "id"} <= token.keys()
    source, target = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    source.write_text("Hello\na\n", encoding="utf-8")
    assert main(["run", *model, *more, "--input", str(source), "--output", str(target)]) == 0
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [len(row["logprobs"]) for row in rows] == [row["tokens"] for row in rows]
    assert (rows[0]["made_with"]["logprobs"], rows[0]["made_with"]["presence_penalty"]) == (2, 1.0)
    capsys.readouterr()
    assert main(["run", "Hi", *model, "--logprobs", "2"]) == 2
    assert "--logprobs needs --json" in capsys.readouterr().err


def test_sampling_is_what_the_model_says_unless_asked(tmp_path: Path, capsys: Capture) -> None:
    folder = make_checkpoint(tmp_path / "model", "gemma")
    path = folder / "generation_config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**config, "do_sample": True, "top_k": 64, "top_p": 0.95}))

    def said(*more: str) -> tuple[str, str]:
        assert main(["run", "Hi", "-m", str(folder), "--device", "cpu", "--max-new-tokens", "8", "--json", *more]) == 0
        captured = capsys.readouterr()
        return json.loads(captured.out)["sampling"], json.loads(captured.out)["text"]

    first = said("--seed", "3")
    assert first == said("--seed", "3")
    assert first[0] == "temperature 1, top-k 64, top-p 0.95, seed 3"
    assert said("--temperature", "0")[0] == "greedy"
    assert said("--temperature", "0.5", "--top-k", "7", "--seed", "3")[0] == (
        "temperature 0.5, top-k 7, top-p 0.95, seed 3"
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["Hi", "--input", "a.txt", "--output", "b.jsonl"], "exclude each other"),
        (["--input", "a.txt"], "need each other"),
        (["Hi", "--output", "b.jsonl"], "need each other"),
        (["Hi", "--resume"], "--resume needs"),
        (["Hi", "--device", "gpu"], "Invalid device"),
        (["Hi", "--device", "cuda:x"], "Invalid device"),
        (["Hi", "--tensor-parallel", "2"], "--engine vllm"),
        (["Hi", "--quantization", "int8"], "is a 4-bit artifact"),
        (["Hi", "--dtype", "float32"], "is a 4-bit artifact"),
        (["Hi", "--attn", "eager"], "is a 4-bit artifact"),
        (["Hi", "--quantization", "fp8"], "--quantization"),
    ],
)
def test_options_that_make_no_sense_are_wrong_usage(
    wrong: list[str], message: str, artifacts: Callable[[str], Path], capsys: Capture
) -> None:
    folder = artifacts("gemma")
    capsys.readouterr()
    assert main(["run", "-m", str(folder), *wrong]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err


def test_verbose_names_the_kernels_and_a_slow_one_is_said_anyway(
    artifacts: Callable[[str], Path], capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from gemma_awq_cli.kernels.cpu import CpuInt4Linear

    arguments = ["run", "Hi", "-m", str(artifacts("gemma3_text")), "--device", "cpu", "--max-new-tokens", "2"]
    assert main(arguments) == 0
    assert "Kernel" not in capsys.readouterr().err
    assert main([*arguments, "--verbose"]) == 0
    said = capsys.readouterr().err
    assert "Kernel: " in said
    assert re.search(r"s to the first token: command line \d.*, importing \d.*, reading and packing weights \d", said)
    monkeypatch.setenv("CXX", "none")
    monkeypatch.setenv("GEMMA_AWQ_CACHE", str(tmp_path / "no-compiler"))
    assert main(arguments) == 0  # a slower forward is taken
    assert "the compiled forward, several times as fast, is not used" in capsys.readouterr().err
    monkeypatch.setattr(CpuInt4Linear, "refusal", staticmethod(lambda *_: "this processor lacks it"))
    assert main(arguments) == 0  # the slower kernel is taken
    assert "slow reference kernel (PyTorch's int4 product for CPUs: this processor lacks it" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gemma", "gemma2", "gemma3_text", "gemma3"])
def test_an_artifact_runs_without_the_second_that_transformers_takes(
    kind: str, artifacts: Callable[[str], Path]
) -> None:
    code = (
        "import sys\nfrom gemma_awq_cli.cli.app import main\n"
        f"assert main(['run', 'Hi', '-m', {str(artifacts(kind))!r}, '--device', 'cpu', '--max-new-tokens', '2']) == 0\n"
        "assert 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_tokenizer_begins_to_load_before_all_else_is_imported(artifacts: Callable[[str], Path]) -> None:
    code = (
        "import sys\nfrom gemma_awq_cli.cli.app import main\nfrom gemma_awq_cli.generate import finding\n"
        "begin, numpy_was_there = finding.begin_loading, []\n"
        "def begin_loading(*given):\n    numpy_was_there.append('numpy' in sys.modules)\n    return begin(*given)\n"
        "finding.begin_loading = begin_loading\n"
        f"arguments = ['-m', {str(artifacts('gemma'))!r}, '--device', 'cpu', '--max-new-tokens', '2']\n"
        "assert main(['run', 'Hi', *arguments]) == 0\n"
        "assert numpy_was_there == [False], numpy_was_there\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_float16_is_warned_about_and_a_nan_is_no_text(tmp_path: Path, capsys: Capture) -> None:
    folder = make_checkpoint(tmp_path / "wide", "gemma3_text")
    edit_weights(folder, lambda tensors: tensors["model.embed_tokens.weight"].fill_(6e4))
    assert main(["run", "Hi", "-m", str(folder), "--device", "cpu", "--dtype", "float16"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "warning: Gemma 3 (text) in float16" in captured.err
    assert "NaN or infinite" in captured.err


def test_a_prompt_beyond_the_context(artifacts: Callable[[str], Path], capsys: Capture) -> None:
    folder = artifacts("gemma")
    capsys.readouterr()
    assert main(["run", "x" * 300, "-m", str(folder), "--device", "cpu"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "The prompt has 301 tokens; this model's context holds 256" in captured.err
