"""The CI examples under docs/ci do what they say, with the command of this checkout and a tiny model."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

DOCS = Path(__file__).parent.parent / "docs" / "ci"
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="shell scripts")


@pytest.fixture
def shell(tmp_path: Path, warm_python: None) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs bash in an empty folder of a checkout, with `gemma-awq` and `python` on the path."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, module in (("gemma-awq", "-m gemma_awq_cli"), ("python", "")):
        (commands / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n')
        (commands / name).chmod(0o755)
    (tmp_path / "docs").symlink_to(DOCS.parent)
    path = os.pathsep.join((str(DOCS.parent.parent), os.environ.get("PYTHONPATH", "")))

    def run(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-e", "-c", script], cwd=tmp_path, text=True, capture_output=True, timeout=240,
            env={**os.environ, "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": path, **variables},
        )  # fmt: skip

    return run


@pytest.mark.slow
def test_the_shell_example(
    shell: Callable[..., subprocess.CompletedProcess[str]], artifacts: Callable[[str], Path], tmp_path: Path
) -> None:
    gate = f"docs/ci/gate.sh '{artifacts('gemma')}' accepted.json --device cpu --windows 1"
    wide = {"MAX_KL": "1000", "MAX_PPL_RATIO": "1000000"}
    result = shell(gate, **wide)
    assert result.returncode == 0, result.stderr
    assert "There is no accepted.json yet" in result.stderr
    document = json.loads((tmp_path / "bench.json").read_text())
    document["models"][0]["fidelity"]["kl"] *= 0.5
    (tmp_path / "accepted.json").write_text(json.dumps(document))
    result = shell(gate, **wide, TOLERANCE="0.2")
    assert result.returncode == 3
    assert "not met: " in result.stderr
    assert "is not good enough" in result.stderr


@pytest.mark.slow
def test_the_workflow_example(
    shell: Callable[..., subprocess.CompletedProcess[str]],
    checkpoints: Callable[[str], Path],
    text_file: Path,
    tmp_path: Path,
) -> None:
    """Every `run:` step but the installation, in order, as the runner would run it."""
    workflow: dict[Any, Any] = yaml.safe_load((DOCS / "gate.yml").read_text(encoding="utf-8"))
    assert "pull_request" in workflow[True]  # YAML 1.1 reads `on` as true
    steps = [step for step in workflow["jobs"]["gate"]["steps"] if "run" in step]
    assert [step["name"] for step in steps] == ["Install", "Quantize", "Gate", "Summary"]
    assert 'pip install "gemma-awq @ $GEMMA_AWQ"' in steps[0]["run"]
    variables = {
        **workflow["env"], "MODEL": str(checkpoints("gemma")), "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md"),
        "MAX_KL": "1000", "MAX_PPL_RATIO": "1000000",
    }  # fmt: skip
    quick = f" --calibration '{text_file}' --group-size 32 --num-samples 24 --seq-len 40 --device cpu"
    scripts = [steps[1]["run"] + quick, steps[2]["run"] + " --device cpu --windows 1", steps[3]["run"]]
    for script in scripts:
        result = shell(script, **variables)
        assert result.returncode == 0, result.stderr
    assert '"kl"' in (tmp_path / "summary.md").read_text()


def test_the_workflow_gives_nobody_more_than_they_need() -> None:
    text = (DOCS / "gate.yml").read_text(encoding="utf-8")
    workflow: dict[Any, Any] = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    assert set(workflow[True]) == {"pull_request", "workflow_dispatch"}
    steps = workflow["jobs"]["gate"]["steps"]
    used = [step["uses"] for step in steps if "uses" in step]
    assert len(used) == 3
    for action in used:
        assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", action)
        assert re.search(rf"{re.escape(action)} # v\d+\.\d+\.\d+\n", text)
    assert steps[0]["with"] == {"persist-credentials": False}
    # nothing of ours by its bare name, which anyone may hold on an index
    for step in steps:
        for line in step.get("run", "").splitlines():
            assert not re.search(r"pip install (?!.*@ )[^#]*gemma", line), line
        # expressions would be read as shell; what steps need comes by `env`
        assert "${{" not in step.get("run", "")
    assert "secrets." not in json.dumps(workflow["env"]) + json.dumps([step for step in steps if "env" in step])
    assert text.count("secrets.HF_TOKEN") == 1
