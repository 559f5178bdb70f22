"""The load test of benchmarks/ against a tiny server: its figures are consistent, and no answer is lost or mixed up."""

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.serve.conftest import Serve, until

pytest.importorskip("uvicorn")

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "serve_load.py"


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    captured = capsys.readouterr()
    assert ended.value.code == 0, captured
    return json.loads(captured.out)["results"]


@pytest.mark.slow
def test_loops_and_a_soak_with_clients_that_vanish(
    serve: Serve, chat_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served = serve(chat_folder, keys=("key",))
    url = f"{served.url}/v1"
    common = [
        "--url", url, "--key", "key", "--model", "gemma-4-tiny-it", "--prompt", "1,4", "--answer", "2,20",
        "--common", "4",
    ]  # fmt: skip
    loops = run(monkeypatch, capsys, "decode", *common, "--streams", "1,3", "--rate", "20", "--requests", "6")
    soaked = run(
        monkeypatch, capsys, "soak", *common, "--requests", "60", "--vanish", "0.4", "--compare", "20",
        "--pid", str(os.getpid()),
    )  # fmt: skip
    results = {**loops[url], **soaked[url]}
    assert list(results) == ["streams 1", "streams 3", "rate 20", "soak"]
    for name in ("streams 1", "streams 3", "rate 20"):
        assert results[name]["outcomes"] == {"ok": 6}
        assert results[name]["ttft"]["p50"] <= results[name]["ttft"]["p99"]
        assert results[name]["tokens_per_second"] > 0
    soak = results["soak"]
    assert set(soak["outcomes"]) == {"ok", "left"}
    assert (soak["lost"], soak["different"], soak["compared"]) == (0, 0, 20)
    assert len(soak["memory_over_time"]) >= 30
    assert list(soak["memory_mb"]) == ["start", "quarter", "half", "end"]
    until(served.idle)
