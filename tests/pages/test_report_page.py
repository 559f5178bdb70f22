"""`show --html`: the page has what the report says, loads nothing, and names no folder of this machine."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gemma_awq_cli.cli.app import main
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.publish.model_card import quantize_command
from tests.documents import full_bench

pytest.importorskip("matplotlib")
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def artifact(tmp_path: Path, artifacts: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(artifacts("gemma3_text"), tmp_path / "made-here" / "my-awq")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "made-here" / "my-awq"


def texts(page: str) -> str:
    return " ".join(re.sub(r"<style>.*?</style>|<[^>]*>", " ", page, flags=re.DOTALL).split())


def test_the_page_has_what_the_report_says(artifact: Path, checkpoints: Callable[[str], Path], capsys: Capture) -> None:
    assert main(["show", str(artifact), "--html"]) == 0
    assert capsys.readouterr().out == "my-awq.html\n"
    page = Path("my-awq.html").read_text(encoding="utf-8")
    report = json.loads((artifact / "quantization_report.json").read_text())
    seen = texts(page)
    assert f"KL divergence, nats per token 0 {report['fidelity']['kl']:.4f}" in seen
    before, after = report["fidelity"]["perplexity_16bit"], report["fidelity"]["perplexity_4bit"]
    assert f"perplexity {before:.3g} {after:.3g}" in seen  # of random weights: too large for decimals
    assert report["calibration"]["sha256"] in seen
    assert report["source"]["config_sha256"] in seen
    assert f"torch {report['versions']['torch']}" in seen
    for number, layer in enumerate(report["layers"], 1):
        for group in layer:
            assert f"{group['method']} {group['error']:.4g} {group['rtn_error']:.4g}" in seen, number
    (command,) = re.findall(r"<pre>(.*?)\n</pre>", page, re.DOTALL)
    assert command.splitlines() == quantize_command(report).splitlines()
    assert "Measured by gemma-awq bench" not in seen
    assert "<svg" in page
    for folder in (artifact.parent, checkpoints("gemma3_text").parent):
        assert str(folder) not in page
    addresses = {*re.findall(r"""(?:src|href)="([^"]*)""", page), *re.findall(r"url\(([^)]*)\)", page)}
    assert all(address.startswith("#") for address in addresses)
    assert not re.search(r"<(script|link|iframe|object|embed|img)|@import", page)
    assert "prefers-color-scheme: dark" in page
    assert not re.search(r'style="[^"]*#[0-9a-f]{6}', page), "a colour that is not the page's own"


def test_a_bench_of_these_weights_is_on_the_page(artifact: Path, capsys: Capture) -> None:
    bench = full_bench()
    bench["models"][0]["identity"] = Checkpoint(artifact).identity()
    (artifact / "bench.json").write_text(json.dumps(bench))
    assert main(["show", str(artifact), "--html", "-o", "page.html"]) == 0
    page = Path("page.html").read_text(encoding="utf-8")
    assert "Measured by gemma-awq bench" in page
    assert page.count("<svg") == 6
    assert "mathdefault" not in page, "a label that only matplotlib itself can draw"
    bench["models"][0]["identity"] = "0" * 64
    (artifact / "bench.json").write_text(json.dumps(bench))
    capsys.readouterr()
    assert main(["show", str(artifact), "--html", "-o", "page.html"]) == 0
    assert "was measured on other weights" in capsys.readouterr().err
    assert "Measured by gemma-awq bench" not in Path("page.html").read_text(encoding="utf-8")


def test_where_no_page_can_be(artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    before = sorted(artifact.iterdir())
    for arguments, code, message in (
        ((str(artifact), "--html", "-o", str(artifact / "page.html")), 1, "would lie in the artifact"),
        ((str(artifact), "--html", "-o", "missing/page.html"), 1, "does not exist"),
        ((str(artifact), "--html", "--json"), 2, "exclude each other"),
        ((str(artifact), "-o", "page.html"), 2, "Add --html"),
    ):
        assert main(["show", *arguments]) == code
        assert message in capsys.readouterr().err
    monkeypatch.chdir(artifact)
    assert main(["show", ".", "--html"]) == 1
    assert sorted(artifact.iterdir()) == before
