"""`bench` as a user and a CI job meet it: table, document, bounds, what is left out, what an interruption keeps."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest

from gemma_awq_cli.bench import drafts, model_search, process
from gemma_awq_cli.bench.document import percentiles
from gemma_awq_cli.bench.first_token import first_token_seconds
from gemma_awq_cli.bench.process import Worker, WorkerEndedError
from gemma_awq_cli.bench.streams import served
from gemma_awq_cli.cli.app import main
from gemma_awq_cli.errors import GemmaAwqError, Terminated
from tests.bench.in_process import InProcess
from tests.tiny import VOCAB, edit_weights, make_checkpoint

Capture = pytest.CaptureFixture[str]
SCHEMA = json.loads((Path(__file__).parent.parent.parent / "docs" / "bench-schema.json").read_text(encoding="utf-8"))
QUICK = ("--device", "cpu", "--threads", "1", "--pp", "12", "--tg", "3", "-r", "2", "--warmup", "1")


@pytest.fixture
def artifact(artifacts: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifacts("gemma"), tmp_path / "artifact"))


def documented(captured: Any) -> dict[str, Any]:
    """The one document on stdout, which the published schema describes."""
    document: dict[str, Any] = json.loads(captured.out)
    jsonschema.validate(document, SCHEMA, cls=jsonschema.Draft202012Validator)
    return document


def test_the_schema_is_a_schema_and_can_fail() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"schema": 2}, SCHEMA)


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_speed_and_fidelity_of_the_last_artifact(
    artifacts: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    folder = artifacts("gemma3_text")
    monkeypatch.setenv("GEMMA_AWQ_MODEL", str(folder))
    page = tmp_path / "page.html"
    assert main(["bench", *QUICK, "--compare", "bf16", "--batch", "1", "--batch", "2", "--report", str(page)]) == 0
    captured = capsys.readouterr()
    for line in ("pp12 x 2, tokens/s", "tg3 x 1, tokens/s", "TTFT", "TPOT", "peak RSS", "KL divergence, mean", "bf16"):
        assert line in captured.out
    assert "\x1b" not in captured.out
    assert f"Model: {folder} (from GEMMA_AWQ_MODEL)" in captured.err
    text = page.read_text(encoding="utf-8")
    # it loads nothing, and its plots are well-formed
    assert not re.findall(r"""(?:src|href)=["'](?!#)""", text)
    assert "@import" not in text
    plots = re.findall(r"<svg .*?</svg>", text, re.DOTALL)
    assert len(plots) == 5
    for plot in plots:
        ElementTree.fromstring(plot.replace("<svg ", '<svg xmlns:xlink="x" ', 1) if "xmlns:xlink" not in plot else plot)
    assert "Error by layer" in text


@pytest.mark.slow
def test_the_document(artifacts: Callable[[str], Path], capsys: Capture) -> None:
    folder, beside = artifacts("gemma"), artifacts("gemma-mqa")
    capsys.readouterr()
    assert main(["bench", str(folder), "--json", *QUICK, "--compare", str(beside)]) == 0
    document = documented(capsys.readouterr())
    assert document["complete"]
    one, other = document["models"]
    assert (one["role"], one["kind"], other["role"]) == ("model", "4-bit", "compare")
    run = one["speed"]["runs"][0]
    assert run["repetitions"] == len(run["ttft_seconds"]["samples"]) == 2
    assert one["speed"]["threads"] == 1
    assert one["speed"]["peak_rss_bytes"] > 100_000_000  # a Python with torch
    assert one["speed"]["relative_to_first"]["decode_tokens_per_second"] == 1
    # all tensors are read for a token: the head is the embedding, and half of one of its two bytes is held
    assert one["speed"]["weight_bytes_per_token"] == one["bytes"] - VOCAB * 64 * 3 // 2
    assert run["bandwidth_share"] > 0
    fidelity = one["fidelity"]
    assert fidelity["tokens"] == fidelity["windows"] * (fidelity["window"] - 1)
    assert fidelity["window"] == 256  # the tiny model's context
    assert sum(fidelity["kl_histogram"]["counts"]) == fidelity["tokens"]
    along = fidelity["kl_along"]
    assert along[0]["first"] == 0
    assert along[-1]["end"] == 255
    mean = sum(part["mean"] * (part["end"] - part["first"]) for part in along) / 255
    assert mean == pytest.approx(fidelity["kl"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_speed_after_tokens_that_were_read_before(artifact: Path, tmp_path: Path, capsys: Capture) -> None:
    speed = ["bench", str(artifact), "--speed", "--json", "--quiet", *QUICK, "--batch", "1", "--batch", "2"]
    assert main([*speed, "--depth", "0,40"]) == 0
    document = documented(capsys.readouterr())
    assert document["settings"]["depths"] == [0, 40]
    runs = document["models"][0]["speed"]["runs"]
    assert [(run["batch"], run["depth"]) for run in runs] == [(1, 0), (1, 40), (2, 0), (2, 40)]
    assert document["models"][0]["speed"]["first_token_seconds"] is None
    # every run is compared with the baseline's
    baseline = tmp_path / "baseline.json"
    for index, place in ((1, "depth 40, batch 1"), (3, "depth 40, batch 2")):
        earlier = json.loads(json.dumps(document))
        earlier["models"][0]["speed"]["runs"][index]["decode_tokens_per_second"]["median"] *= 1e6
        baseline.write_text(json.dumps(earlier))
        assert main([*speed, "--depth", "0,40", "--baseline", str(baseline), "--tolerance", "0.99"]) == 3
        assert f"decoding speed (tokens/s), {place}, is" in capsys.readouterr().err
    assert main([*speed, "--baseline", str(baseline)]) == 1
    assert "was measured with depths [0, 40]" in capsys.readouterr().err
    assert main([*speed, "--depth", "0,250"]) == 1
    assert "A depth of 250, 12 prompt tokens and 3 new ones exceed" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("numbers", ["", "-1", "1,", "1.5", "x", "1" * 8, "²"])
@pytest.mark.parametrize("option", ["--depth", "--streams"])
def test_numbers_with_commas(option: str, numbers: str, capsys: Capture) -> None:
    assert main(["bench", "somewhere", f"{option}={numbers}"]) == 2
    assert option in capsys.readouterr().err


@pytest.mark.parametrize("streams", ["0", "1,513"])
def test_streams_are_at_least_one_and_not_too_many(streams: str, capsys: Capture) -> None:
    assert main(["bench", "somewhere", "--streams", streams]) == 2
    assert "from 1 to 512" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--fidelity", "--streams", "2"], "--streams needs --speed"),
        (["--fidelity", "--draft", "lookup"], "--draft needs --speed"),
        (["--draft", "none"], "--draft none measures nothing"),
    ],
)
def test_what_has_to_be_measured_with_speed(options: list[str], said: str, capsys: Capture) -> None:
    assert main(["bench", "somewhere", *options]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_streams_and_drafted_tokens(
    artifacts: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    pytest.importorskip("uvicorn")
    folder = artifacts("gemma3_text")
    texts = [{"kind": kind, "name": kind, "prompt": "A text that is short. ", "stop": []} for kind in ("edit", "other")]
    copied = "A text that is short. A text that is short."
    file = tmp_path / "texts.json"
    file.write_text(json.dumps([{**text, "answer": copied} for text in texts]))
    monkeypatch.setattr(drafts, "TEXTS", file)
    for name, value in (("API_KEY", "a key that the bench does not send"), ("SERVE_MAX_ROWS", "1"), ("ENGINE", "vllm")):
        monkeypatch.setenv(f"GEMMA_AWQ_{name}", value)  # these are for the command that a user gives
    capsys.readouterr()
    bench = ["bench", str(folder), "--speed", "--json", *QUICK, "--tg", "30", "--streams", "1,3", "--draft", "lookup"]
    # the second competitor is not one of this tool's own runs, which these are measured of
    assert main([*bench, "--compare", str(folder), "--compare", "fp16"]) == 0
    document = documented(capsys.readouterr())
    for model in document["models"][:2]:
        speed = model["speed"]
        assert [(one["streams"], one["requests"]) for one in speed["streams"]] == [(1, 2), (3, 6)]
        for one in speed["streams"]:
            assert one["tokens_per_second"] > 0
            assert 0 < one["ttft_seconds"]["p50"] <= one["ttft_seconds"]["p99"]
        assert speed["drafts"]["way"] == "written"
        assert [kind["kind"] for kind in speed["drafts"]["kinds"]] == ["edit", "other"]
        for kind in speed["drafts"]["kinds"]:
            assert kind["tokens"] == 29  # behind the first
            assert kind["drafted_tokens"] >= kind["accepted_tokens"] > 10
            assert len(kind["speedup"]["samples"]) == 2
    assert document["models"][2]["speed"]["streams"] == []
    assert document["models"][2]["speed"]["drafts"] is None
    # both are compared with a baseline's
    baseline = tmp_path / "baseline.json"
    document["models"][0]["speed"]["streams"][1]["tokens_per_second"] *= 1e6
    document["models"][0]["speed"]["drafts"]["kinds"][0]["decode_tokens_per_second"]["median"] *= 1e6
    baseline.write_text(json.dumps(document))
    assert main([*bench, "--baseline", str(baseline), "--tolerance", "0.99"]) == 3
    said = capsys.readouterr().err
    assert "tokens/s of 3 streams is" in said
    assert "drafted decoding speed (tokens/s), edit, is" in said
    assert "1 streams" not in said


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_a_server_that_does_not_start_is_named(artifact: Path, capsys: Capture) -> None:
    pytest.importorskip("uvicorn")
    # the server's rows hold prompt and answer, and more than its context is refused by it, not by the bench
    failed = pytest.raises(GemmaAwqError, match=f"`gemma-awq serve` of {artifact.name} failed: ")
    with failed as error, served(artifact, "cpu", 1, 1, 100_000):
        pass
    assert "--max-context" in f"{error.value.message} {error.value.hint}"


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_the_first_token_of_the_command_line(artifact: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["bench", str(artifact), "--speed", "--json", *QUICK, "--first-token"]) == 0
    document = documented(capsys.readouterr())
    assert len(document["models"][0]["speed"]["first_token_seconds"]["samples"]) == 2
    assert main(["bench", str(artifact), "--fidelity", "--first-token"]) == 2
    assert "--first-token needs --speed" in capsys.readouterr().err
    with pytest.raises(GemmaAwqError, match=f"`gemma-awq run` of {tmp_path.name} failed: error"):
        first_token_seconds(tmp_path, "cpu", 1)


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_bounds_end_in_3_with_a_line_each(artifact: Path, tmp_path: Path, capsys: Capture) -> None:
    speed = ["bench", str(artifact), "--speed", "--json", "--quiet", *QUICK]
    assert main([*speed, "--min-decode-tps", "1e9", "--max-rss", "1MB"]) == 3
    captured = capsys.readouterr()
    documented(captured)
    assert len([line for line in captured.err.splitlines() if line.startswith("not met: ")]) == 2
    assert main([*speed, "--min-decode-tps", "0.001", "--max-rss", "64GB"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    measured = documented(captured)
    # a baseline that was much faster, and one that was slower
    baseline = tmp_path / "baseline.json"
    for factor, code in ((1000, 3), (0.001, 0)):
        earlier = json.loads(json.dumps(measured))
        for rate in ("decode_tokens_per_second", "prompt_tokens_per_second"):
            earlier["models"][0]["speed"]["runs"][0][rate]["median"] *= factor
        baseline.write_text(json.dumps(earlier))
        assert main([*speed, "--baseline", str(baseline), "--tolerance", "0.5"]) == code
        said = capsys.readouterr().err
        assert ("the baseline's" in said) == (code == 3)
    earlier["settings"]["prompt_tokens"] = 99
    baseline.write_text(json.dumps(earlier))
    assert main([*speed, "--baseline", str(baseline)]) == 1
    assert "was measured with prompt_tokens 99" in capsys.readouterr().err
    baseline.write_text("{}")
    assert main([*speed, "--baseline", str(baseline)]) == 1
    assert "is not a document of" in capsys.readouterr().err


def test_bounds_of_fidelity(artifact: Path, capsys: Capture) -> None:
    fidelity = ["bench", str(artifact), "--fidelity", "--device", "cpu", "--windows", "1"]
    assert main([*fidelity, "--max-kl", "1e-9", "--max-ppl-ratio", "100"]) == 3
    captured = capsys.readouterr()
    assert "not met: " in captured.err
    assert "KL divergence (nats per token) is" in captured.err
    assert "tokens/s" not in captured.out
    assert main([*fidelity, "--max-kl", "100"]) == 0
    assert main([*fidelity, "--min-decode-tps", "1"]) == 2  # speed is not measured
    assert main([*fidelity, "--max-rss", "much"]) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_an_original_that_is_not_here_is_said_and_the_rest_runs(artifact: Path, capsys: Capture) -> None:
    report = artifact / "quantization_report.json"
    told = json.loads(report.read_text())
    told["source"]["model"] = "/no/such/checkpoint"
    report.write_text(json.dumps(told))
    assert main(["bench", str(artifact), "--json", *QUICK]) == 0
    captured = capsys.readouterr()
    document = documented(captured)
    assert document["models"][0]["fidelity"] is None
    assert document["left_out"][0]["part"] == "fidelity"
    assert "--reference" in captured.err
    # asked for by name, or bounded, it is not passed over
    assert main(["bench", str(artifact), "--fidelity"]) == 1
    assert "is not on this machine" in capsys.readouterr().err
    assert main(["bench", str(artifact), *QUICK, "--max-kl", "9"]) == 3
    assert "was not measured" in capsys.readouterr().err


def test_a_reference_of_another_model_is_refused(
    artifact: Path, checkpoints: Callable[[str], Path], tmp_path: Path, capsys: Capture
) -> None:
    def refused(reference: Path) -> str:
        capsys.readouterr()
        assert main(["bench", str(artifact), "--fidelity", "--device", "cpu", "--reference", str(reference)]) == 1
        return capsys.readouterr().err

    assert "is another model than" in refused(checkpoints("gemma-mqa"))
    assert "is itself quantized" in refused(artifact)
    config = Path(shutil.copytree(checkpoints("gemma"), tmp_path / "config"))
    values = json.loads((config / "config.json").read_text())
    values["rms_norm_eps"] = 1e-3
    (config / "config.json").write_text(json.dumps(values))
    assert "its rms_norm_eps is 0.001" in refused(config)
    words = Path(shutil.copytree(checkpoints("gemma"), tmp_path / "words"))
    tokenizer = json.loads((words / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    (words / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "has another tokenizer" in refused(words)
    # other weights of the same shape are measured, and that is said
    other = make_checkpoint(tmp_path / "other", "gemma", seed=5)
    arguments = ["bench", str(artifact), "--fidelity", "--device", "cpu", "--windows", "1", "--reference", str(other)]
    assert main(arguments) == 0
    assert "is not the checkpoint that" in capsys.readouterr().err


def test_texts_that_are_too_short(artifact: Path, tmp_path: Path, capsys: Capture) -> None:
    text = tmp_path / "short.txt"
    text.write_text("Hello there.")
    arguments = ["bench", str(artifact), "--fidelity", "--device", "cpu", "--text", str(text)]
    assert main([*arguments, "--window", "32"]) == 1
    assert "has 12 tokens, fewer than the 31 that fill a window" in capsys.readouterr().err
    assert main([*arguments, "--window", "300"]) == 1
    assert "does not fit this model's context of 256" in capsys.readouterr().err
    assert main([*arguments, "--json"]) == 0  # without --window it is one window
    assert documented(capsys.readouterr())["models"][0]["fidelity"]["window"] == 13
    text.write_text("")
    assert main(arguments) == 1
    assert "is empty" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_competitors_that_are_not_there(artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(model_search, "find_spec", lambda _: None)
    compare = ("--compare", "nf4", "--compare", "no-such-model", "--compare", "bf16")
    assert main(["bench", str(artifact), "--speed", "--json", *QUICK, *compare]) == 0
    captured = capsys.readouterr()
    document = documented(captured)
    assert [model["name"] for model in document["models"]] == [str(artifact), "bf16"]
    assert [part["model"] for part in document["left_out"]] == ["nf4", "no-such-model"]
    assert 'pip install "bitsandbytes>=0.50"' in captured.err


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_a_competitor_that_fails_does_not_end_the_bench(artifact: Path, tmp_path: Path, capsys: Capture) -> None:
    broken = Path(shutil.copytree(artifact, tmp_path / "broken"))
    edit_weights(broken, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    assert main(["bench", str(artifact), "--speed", "--json", *QUICK, "--compare", str(broken)]) == 0
    document = documented(capsys.readouterr())
    assert document["models"][1]["speed"] is None
    assert "NaN" in document["left_out"][0]["reason"]
    assert main(["bench", str(broken), "--speed", *QUICK]) == 1
    assert "NaN" in capsys.readouterr().err


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_an_interruption_keeps_what_was_measured(
    error: type[BaseException], code: int, artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    answered: Iterator[int] = iter(range(100))
    ask = InProcess.ask

    def interrupted(self: InProcess, on_progress: Any = None, **request: Any) -> dict[str, Any]:
        if request["do"] == "sample" and next(answered) == 2:  # after the warm-up and one repetition
            raise error
        return ask(self, **request)

    monkeypatch.setattr(InProcess, "ask", interrupted)
    assert main(["bench", str(artifact), "--json", *QUICK]) == code
    captured = capsys.readouterr()
    document = documented(captured)
    assert not document["complete"]
    assert document["models"][0]["speed"]["runs"][0]["repetitions"] == 1
    assert document["models"][0]["fidelity"] is None
    assert "are not complete" in captured.err


@pytest.mark.slow
def test_a_process_that_dies_is_said() -> None:
    worker = Worker("x", 1)
    worker.process.kill()
    with pytest.raises(WorkerEndedError, match="The process that measured x was killed") as killed:
        worker.ask(do="bandwidth")
    assert killed.value.output == ""
    worker.end()
    worker = Worker("x", 1)
    with pytest.raises(WorkerEndedError, match="The process that measured x ended: AssertionError: no request") as bug:
        worker.ask(do="nonsense")
    # a bug is not only named: where it is comes along
    assert bug.value.output.startswith("Traceback (most recent call last):")
    assert "worker.py" in bug.value.output
    worker.end()


def test_a_process_that_cannot_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """It closed its answers, and something of a library's keeps it alive."""
    script = "import os, sys, time; print('ValueError: x', file=sys.stderr, flush=True); os.close(1); time.sleep(300)"
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _, **options: start([sys.executable, "-c", script], **options))
    monkeypatch.setattr(process, "ENDING_SECONDS", 0.5)
    worker = Worker("x", 1)
    with pytest.raises(GemmaAwqError, match="The process that measured x ended: ValueError: x"):
        worker.ask(do="bandwidth")
    worker.end()


def test_an_answer_that_is_cut_off_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import sys; print('{\"bytes_per_sec', end='', flush=True); print('killed', file=sys.stderr)"
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _, **options: start([sys.executable, "-c", script], **options))
    worker = Worker("x", 1)
    with pytest.raises(GemmaAwqError, match="The process that measured x ended: killed"):
        worker.ask(do="bandwidth")
    worker.end()


def test_percentiles_are_nearest_ranks() -> None:
    assert percentiles([float(n) for n in range(1, 101)]) == {"mean": 50.5, "p50": 50, "p90": 90, "p99": 99}
    assert percentiles([7.0])["p99"] == 7


def test_a_page_needs_its_library_before_anything_is_measured(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    from gemma_awq_cli.reports import html_pages

    assert main(["bench", str(artifact), "--report", str(tmp_path / "no" / "page.html")]) == 1
    assert "does not exist" in capsys.readouterr().err
    monkeypatch.setattr(html_pages, "find_spec", lambda _: None)
    assert main(["bench", str(artifact), "--report", str(tmp_path / "page.html")]) == 1
    assert 'pip install "matplotlib>=3.9"' in capsys.readouterr().err


@pytest.mark.usefixtures("in_process")
def test_what_was_saved_is_on_the_card_and_only_of_these_weights(artifact: Path, capsys: Capture) -> None:
    push = ["push", "me/x", str(artifact), "--base-model", "org/tiny", "--license", "gemma", "--dry-run"]
    assert main(push) == 0
    assert "## Measured speed" not in capsys.readouterr().out
    assert main(["bench", str(artifact), "--speed", "--save", "--compare", "bf16", *QUICK]) == 0
    capsys.readouterr()
    saved = json.loads((artifact / "bench.json").read_text())
    jsonschema.validate(saved, SCHEMA)
    assert main(push) == 0
    captured = capsys.readouterr()
    rate = saved["models"][0]["speed"]["runs"][0]["decode_tokens_per_second"]["median"]
    assert "## Measured speed" in captured.out
    assert "| | this model | bf16 |\n|:---|---:|---:|\n| Prompt of 12 tokens" in captured.out
    assert f"| Decoding 3 tokens, tokens/s | {rate:.1f} |" in captured.out
    assert "bench.json" in captured.err
    from gemma_awq_cli.publish.public_documents import public_bench

    assert str(artifact.parent) not in json.dumps(public_bench(saved))
    edit_weights(artifact, lambda tensors: tensors["model.norm.weight"].add_(0.5))
    assert main(push) == 1
    assert "was measured on other weights" in capsys.readouterr().err
